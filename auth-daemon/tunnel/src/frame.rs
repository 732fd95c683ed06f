//! The frame format of the tunnel (docs/WIRE.md): an encoder, and an incremental decoder.
//!
//! A frame consists of a type (one byte), a length (four bytes, network byte order) and a payload of that length. DATA
//! passes through the decoder without a copy. All other frames are small and are buffered whole.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::Range,
};

/// Size of a frame's header, in bytes.
pub const HEADER_BYTES: usize = 5;
/// Largest DATA payload that a peer may announce, in bytes.
pub const MAX_DATA_BYTES: u32 = 1 << 20;
/// Largest payload of any other frame, in bytes.
pub const MAX_CONTROL_BYTES: usize = 256;
/// Largest reason of a RESET, in bytes.
const MAX_REASON_BYTES: usize = 200;
/// Protocol version of this build.
const VERSION: u8 = 1;

const CONNECT: u8 = 1;
const CONNECTED: u8 = 2;
/// Type of DATA frames, for callers that write the header themselves.
pub const DATA: u8 = 3;
const END: u8 = 4;
const RESET: u8 = 5;

/// Opens an app connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// The address that the app dialled: an endpoint's or a service's.
    pub dialled: SocketAddr,
    /// The client's own address, which the server's app sees as its peer.
    pub client: SocketAddr,
}

/// Ends an app connection immediately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reset {
    /// Category of the reason.
    pub code: ResetCode,
    /// Reason for the peer's log. Printable, at most 200 bytes.
    pub reason: String,
}

/// Why an app connection was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ResetCode {
    /// The app reset its connection.
    App = 1,
    /// The server's app refused the connection.
    Refused = 2,
    /// The server's app did not answer.
    Unreachable = 3,
    /// Forbidden by the peer's identity or by a policy.
    Forbidden = 4,
    /// The other side violated the protocol.
    Protocol = 5,
    /// The daemon is shutting down or failed internally.
    Internal = 6,
}

/// Result of decoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Start of an app connection.
    Connect(Connect),
    /// The server's app accepted the connection.
    Connected,
    /// App bytes, as a range of the input.
    Data(Range<usize>),
    /// This direction has ended.
    End,
    /// The app connection was reset.
    Reset(Reset),
}

/// How a peer violated the framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFrame {
    /// Unknown frame type.
    #[error("unknown frame type {0}")]
    Type(u8),
    /// A length that the frame type does not allow.
    #[error("frame of type {0} with length {1}")]
    Length(u8, u32),
    /// A CONNECT of a version that this build does not support.
    #[error("CONNECT of version {0}; this daemon speaks version {VERSION}")]
    Version(u8),
    /// A CONNECT whose addresses do not parse.
    #[error("malformed CONNECT")]
    Connect,
    /// A RESET with an unknown code, or a reason that is not UTF-8.
    #[error("malformed RESET")]
    Reset,
}

/// Incremental decoder. Buffers at most one control frame, and only if it arrives in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Received bytes of the current header.
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    /// Received bytes of an incomplete control frame.
    control: Vec<u8>,
    /// Remaining bytes of the current DATA frame.
    data_left: u32,
}

impl Decoder {
    /// Creates a decoder at a frame boundary.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the last decoded byte ended a frame.
    pub fn at_boundary(&self) -> bool {
        self.header_bytes == 0 && self.data_left == 0
    }

    /// Consumes bytes from the front of `input` up to the next event. Returns the number of consumed bytes, and the
    /// event if one is complete. Without an event, all of `input` is consumed.
    pub fn decode(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), InvalidFrame> {
        let mut taken = 0;
        loop {
            if self.data_left > 0 {
                let available = (input.len() - taken).min(self.data_left as usize);
                if available == 0 {
                    return Ok((taken, None));
                }
                self.data_left -= available as u32;
                let range = taken..taken + available;
                return Ok((range.end, Some(Event::Data(range))));
            }
            let piece = (HEADER_BYTES - self.header_bytes).min(input.len() - taken);
            self.header[self.header_bytes..self.header_bytes + piece]
                .copy_from_slice(&input[taken..taken + piece]);
            self.header_bytes += piece;
            taken += piece;
            if self.header_bytes < HEADER_BYTES {
                return Ok((taken, None));
            }
            let (kind, length) = self.check_header()?;
            if kind == DATA {
                self.data_left = length;
                self.header_bytes = 0;
                continue;
            }
            let missing = length as usize - self.control.len();
            let piece = &input[taken..input.len().min(taken + missing)];
            taken += piece.len();
            if piece.len() < missing {
                self.control.extend_from_slice(piece);
                return Ok((taken, None));
            }
            self.header_bytes = 0;
            let event = if self.control.is_empty() {
                parse_control(kind, piece)?
            } else {
                self.control.extend_from_slice(piece);
                parse_control(kind, &std::mem::take(&mut self.control))?
            };
            return Ok((taken, Some(event)));
        }
    }

    /// Type and length of the current frame.
    fn check_header(&self) -> Result<(u8, u32), InvalidFrame> {
        let [kind, length @ ..] = self.header;
        let length = u32::from_be_bytes(length);
        let allowed = match kind {
            DATA => 1..=MAX_DATA_BYTES,
            CONNECT | RESET => 1..=MAX_CONTROL_BYTES as u32,
            CONNECTED | END => 0..=0,
            _ => return Err(InvalidFrame::Type(kind)),
        };
        if allowed.contains(&length) {
            Ok((kind, length))
        } else {
            Err(InvalidFrame::Length(kind, length))
        }
    }
}

fn parse_control(kind: u8, payload: &[u8]) -> Result<Event, InvalidFrame> {
    match kind {
        CONNECT => {
            let (&version, rest) = payload.split_first().ok_or(InvalidFrame::Connect)?;
            if version != VERSION {
                return Err(InvalidFrame::Version(version));
            }
            let (dialled, rest) = parse_address(rest).ok_or(InvalidFrame::Connect)?;
            let (client, rest) = parse_address(rest).ok_or(InvalidFrame::Connect)?;
            if !rest.is_empty() {
                return Err(InvalidFrame::Connect);
            }
            Ok(Event::Connect(Connect { dialled, client }))
        }
        CONNECTED => Ok(Event::Connected),
        END => Ok(Event::End),
        RESET => {
            let (&code, reason) = payload.split_first().ok_or(InvalidFrame::Reset)?;
            let reason = std::str::from_utf8(reason).map_err(|_| InvalidFrame::Reset)?;
            if reason.len() > MAX_REASON_BYTES {
                return Err(InvalidFrame::Reset);
            }
            Ok(Event::Reset(Reset {
                code: ResetCode::from_byte(code).ok_or(InvalidFrame::Reset)?,
                reason: printable(reason),
            }))
        }
        _ => Err(InvalidFrame::Type(kind)),
    }
}

fn parse_address(bytes: &[u8]) -> Option<(SocketAddr, &[u8])> {
    let (&family, rest) = bytes.split_first()?;
    let (ip, rest): (IpAddr, _) = match family {
        4 => {
            let (ip, rest) = rest.split_first_chunk::<4>()?;
            (Ipv4Addr::from(*ip).into(), rest)
        }
        6 => {
            let (ip, rest) = rest.split_first_chunk::<16>()?;
            let ip = Ipv6Addr::from(*ip);
            // Reject IPv4-mapped addresses, so that each address has one encoding.
            if ip.to_ipv4_mapped().is_some() {
                return None;
            }
            (ip.into(), rest)
        }
        _ => return None,
    };
    let (port, rest) = rest.split_first_chunk::<2>()?;
    Some((SocketAddr::new(ip, u16::from_be_bytes(*port)), rest))
}

/// Replaces control characters, because the peer's reason is written to the log.
fn printable(reason: &str) -> String {
    reason
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

impl ResetCode {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::App,
            Self::Refused,
            Self::Unreachable,
            Self::Forbidden,
            Self::Protocol,
            Self::Internal,
        ]
        .into_iter()
        .find(|code| *code as u8 == byte)
    }
}

/// Appends a CONNECT frame to `out`.
pub fn encode_connect(connect: &Connect, out: &mut Vec<u8>) {
    let start = begin(CONNECT, out);
    out.push(VERSION);
    for address in [connect.dialled, connect.client] {
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => {
                out.push(4);
                out.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                out.push(6);
                out.extend_from_slice(&ip.octets());
            }
        }
        out.extend_from_slice(&address.port().to_be_bytes());
    }
    finish(start, out);
}

/// Appends `data` as a DATA frame to `out`. Appends nothing if `data` is empty.
pub fn encode_data(data: &[u8], out: &mut Vec<u8>) {
    if !data.is_empty() {
        out.extend_from_slice(&data_header(data.len()));
        out.extend_from_slice(data);
    }
}

/// Appends a CONNECTED frame to `out`.
pub fn encode_connected(out: &mut Vec<u8>) {
    let start = begin(CONNECTED, out);
    finish(start, out);
}

/// Appends an END frame to `out`.
pub fn encode_end(out: &mut Vec<u8>) {
    let start = begin(END, out);
    finish(start, out);
}

/// Appends a RESET frame to `out`. A reason that is too long is truncated.
pub fn encode_reset(reset: &Reset, out: &mut Vec<u8>) {
    let start = begin(RESET, out);
    out.push(reset.code as u8);
    let mut end = reset.reason.len().min(MAX_REASON_BYTES);
    while !reset.reason.is_char_boundary(end) {
        end -= 1;
    }
    out.extend_from_slice(&reset.reason.as_bytes()[..end]);
    finish(start, out);
}

/// The header of a DATA frame with `length` bytes to follow.
pub fn data_header(length: usize) -> [u8; HEADER_BYTES] {
    debug_assert!(length > 0 && length <= MAX_DATA_BYTES as usize);
    let [a, b, c, d] = (length as u32).to_be_bytes();
    [DATA, a, b, c, d]
}

fn begin(kind: u8, out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.extend_from_slice(&[kind, 0, 0, 0, 0]);
    start
}

fn finish(start: usize, out: &mut [u8]) {
    let length = (out.len() - start - HEADER_BYTES) as u32;
    out[start + 1..start + HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Decodes `bytes` in pieces of `piece` bytes and collects the events, with the payload of each DATA event.
    fn decode_all(bytes: &[u8], piece: usize) -> Result<Vec<(Event, Vec<u8>)>, InvalidFrame> {
        let mut decoder = Decoder::new();
        let mut events = Vec::new();
        for chunk in bytes.chunks(piece) {
            let mut rest = chunk;
            while !rest.is_empty() {
                let (taken, event) = decoder.decode(rest)?;
                assert!(taken > 0, "no progress");
                match event {
                    Some(Event::Data(range)) => {
                        events.push((Event::Data(0..0), rest[range].to_vec()));
                    }
                    Some(event) => events.push((event, Vec::new())),
                    None => assert_eq!(taken, rest.len()),
                }
                rest = &rest[taken..];
            }
        }
        Ok(events)
    }

    fn connect() -> Connect {
        Connect {
            dialled: "10.96.0.7:80".parse().unwrap(),
            client: "[fd77::2]:40000".parse().unwrap(),
        }
    }

    #[test]
    fn a_connection_in_any_pieces() {
        let reset = Reset {
            code: ResetCode::App,
            reason: "gone".into(),
        };
        let mut bytes = Vec::new();
        encode_connect(&connect(), &mut bytes);
        encode_connected(&mut bytes);
        bytes.extend_from_slice(&data_header(3));
        bytes.extend_from_slice(b"abc");
        encode_end(&mut bytes);
        encode_reset(&reset, &mut bytes);
        for piece in 1..bytes.len() {
            let events = decode_all(&bytes, piece).unwrap();
            let data: Vec<u8> = events.iter().flat_map(|(_, data)| data.clone()).collect();
            assert_eq!(data, b"abc");
            let control: Vec<_> = events
                .into_iter()
                .map(|(event, _)| event)
                .filter(|event| !matches!(event, Event::Data(_)))
                .collect();
            assert_eq!(
                control,
                [
                    Event::Connect(connect()),
                    Event::Connected,
                    Event::End,
                    Event::Reset(reset.clone())
                ]
            );
        }
    }

    #[test]
    fn the_bytes_of_a_connect() {
        let mut bytes = Vec::new();
        let connect = Connect {
            dialled: "10.96.0.7:80".parse().unwrap(),
            client: "10.1.0.2:40000".parse().unwrap(),
        };
        encode_connect(&connect, &mut bytes);
        let expected = [
            1, 0, 0, 0, 15, 1, 4, 10, 96, 0, 7, 0, 80, 4, 10, 1, 0, 2, 0x9c, 0x40,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn refuses_bad_frames() {
        use InvalidFrame as E;
        let cases: &[(&[u8], E)] = &[
            (&[0, 0, 0, 0, 0], E::Type(0)),
            (&[6, 0, 0, 0, 0], E::Type(6)),
            (&[1, 0xff, 0xff, 0xff, 0xff], E::Length(1, u32::MAX)),
            (&[3, 0xff, 0xff, 0xff, 0xff], E::Length(3, u32::MAX)),
            (&[3, 0, 0, 0, 0], E::Length(3, 0)),
            (&[3, 0, 0x10, 0, 1], E::Length(3, (1 << 20) + 1)),
            (&[2, 0, 0, 0, 1], E::Length(2, 1)),
            (&[4, 0, 0, 0, 1], E::Length(4, 1)),
            (&[1, 0, 0, 0, 0], E::Length(1, 0)),
            (&[1, 0, 0, 0, 1, 2], E::Version(2)),
            (&[1, 0, 0, 0, 2, 1, 4], E::Connect),
            (&[1, 0, 0, 0, 2, 1, 5], E::Connect),
            (&[5, 0, 0, 0, 1, 0], E::Reset),
            (&[5, 0, 0, 0, 2, 1, 0xff], E::Reset),
        ];
        for (bytes, expected) in cases {
            assert_eq!(decode_all(bytes, 64).unwrap_err(), *expected, "{bytes:?}");
        }
        let mut longer = Vec::new();
        encode_connect(&connect(), &mut longer);
        longer.push(0);
        longer[4] += 1;
        assert_eq!(decode_all(&longer, 64).unwrap_err(), E::Connect);
    }

    #[test]
    fn a_peer_cannot_write_control_characters_into_the_log() {
        let mut bytes = Vec::new();
        encode_reset(
            &Reset {
                code: ResetCode::Internal,
                reason: "a\nb\x1b[0m".into(),
            },
            &mut bytes,
        );
        let events = decode_all(&bytes, 1024).unwrap();
        let (Event::Reset(reset), _) = &events[0] else {
            panic!("{events:?}");
        };
        assert_eq!(reset.reason, "a?b?[0m");
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let mut bytes = Vec::new();
        encode_reset(
            &Reset {
                code: ResetCode::Internal,
                reason: "ä".repeat(300),
            },
            &mut bytes,
        );
        assert!(decode_all(&bytes, 1024).is_ok());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), piece in 1usize..64) {
            let _ = decode_all(&bytes, piece);
        }

        #[test]
        fn addresses_round_trip(a: [u8; 16], b: [u8; 4], ports: (u16, u16)) {
            let dialled = SocketAddr::new(IpAddr::from(a).to_canonical(), ports.0);
            let client = SocketAddr::new(IpAddr::from(b), ports.1);
            let connect = Connect { dialled, client };
            let mut bytes = Vec::new();
            encode_connect(&connect, &mut bytes);
            prop_assert_eq!(&decode_all(&bytes, 7).unwrap()[0].0, &Event::Connect(connect));
        }
    }
}
