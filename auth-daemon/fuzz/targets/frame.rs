//! Frames: never a panic, the same events however the bytes are cut, and what is decoded encodes to itself.

use auth_tunnel::{
    frame::Decoder, frame::Event, frame::InvalidFrame, frame::MAX_CONTROL_BYTES,
    frame::data_header, frame::encode_connect, frame::encode_connected, frame::encode_end,
    frame::encode_reset,
};

pub(super) fn run(input: &[u8]) {
    let Some((&cut, bytes)) = input.split_first() else {
        return;
    };
    let whole = decode(bytes, bytes.len().max(1));
    let pieces = decode(bytes, usize::from(cut).max(1));
    assert_eq!(whole, pieces, "cut into pieces of {cut}");
    for event in &whole.0 {
        let mut encoded = Vec::new();
        match event {
            Decoded::Control(Event::Connect(connect)) => encode_connect(connect, &mut encoded),
            Decoded::Control(Event::Connected) => encode_connected(&mut encoded),
            Decoded::Control(Event::End) => encode_end(&mut encoded),
            Decoded::Control(Event::Reset(reset)) => {
                assert!(!reset.reason.chars().any(char::is_control));
                assert!(reset.reason.len() < MAX_CONTROL_BYTES);
                encode_reset(reset, &mut encoded);
            }
            Decoded::Control(Event::Data(_)) => unreachable!("gathered as bytes"),
            Decoded::Data(data) => {
                encoded.extend_from_slice(&data_header(data.len()));
                encoded.extend_from_slice(data);
            }
        }
        assert_eq!(
            decode(&encoded, encoded.len()).0,
            std::slice::from_ref(event)
        );
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Decoded {
    Control(Event),
    /// Neighbouring pieces joined: where frames are cut is the wire's business.
    Data(Vec<u8>),
}

fn decode(bytes: &[u8], piece: usize) -> (Vec<Decoded>, Option<InvalidFrame>, bool) {
    let mut decoder = Decoder::new();
    let mut events = Vec::new();
    for mut rest in bytes.chunks(piece) {
        while !rest.is_empty() {
            let (taken, event) = match decoder.decode(rest) {
                Ok(decoded) => decoded,
                Err(error) => return (events, Some(error), false),
            };
            assert!(taken <= rest.len(), "took more than there was");
            assert!(event.is_some() || taken == rest.len(), "left bytes behind");
            match event {
                Some(Event::Data(range)) => {
                    assert!(!range.is_empty() && range.end == taken);
                    let data = &rest[range];
                    if let Some(Decoded::Data(before)) = events.last_mut() {
                        before.extend_from_slice(data);
                    } else {
                        events.push(Decoded::Data(data.to_vec()));
                    }
                }
                Some(event) => events.push(Decoded::Control(event)),
                None => {}
            }
            rest = &rest[taken..];
        }
    }
    (events, None, decoder.at_boundary())
}
