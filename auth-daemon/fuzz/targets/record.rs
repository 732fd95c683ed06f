//! Records: never a panic on noise, what is sealed opens to itself, and what was changed on the way does not open.

use auth_tunnel::{
    record::ContentType, record::HEADER_BYTES, record::MAX_PLAIN_BYTES, record::MAX_RECORD_BYTES,
    record::Opener, record::Sealer, record::complete, secrets::TrafficSecret, tls,
};
use rustls::crypto::tls13::OkmBlock;

pub(super) fn run(input: &[u8]) {
    let Some((&[suite, ref change @ ..], bytes)) = input.split_first_chunk::<5>() else {
        return;
    };
    let change = u32::from_be_bytes(*change);
    noise(suite, bytes);
    let plain = &bytes[..bytes.len().min(MAX_PLAIN_BYTES)];
    let kind = [
        ContentType::ApplicationData,
        ContentType::Handshake,
        ContentType::Alert,
    ][usize::from(suite / 3 % 3)];
    let mut room = vec![0; MAX_RECORD_BYTES];
    room[HEADER_BYTES..HEADER_BYTES + plain.len()].copy_from_slice(plain);
    let length = Sealer::new(7, secret(suite)).seal(&mut room, plain.len(), kind);
    let record = &mut room[..length];
    assert_eq!(complete(record), Ok(Some(length)));
    assert_eq!(complete(&record[..length - 1]), Ok(None));
    let opener = || Opener::new(7, secret(suite));

    let mut changed = record.to_vec();
    let bit = change as usize % (length * 8);
    changed[bit / 8] ^= 1 << (bit % 8);
    if complete(&changed) == Ok(Some(length)) {
        assert!(
            opener().open(&mut changed).is_err(),
            "bit {bit} was changed"
        );
    }
    assert_eq!(opener().open(record), Ok((kind, plain.len())));
    assert_eq!(&record[HEADER_BYTES..HEADER_BYTES + plain.len()], plain);
}

/// As the channel takes it: record after record, until one is not whole or not right.
fn noise(suite: u8, bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    let mut rest = bytes.as_mut_slice();
    let mut opener = Opener::new(0, secret(suite));
    while let Ok(Some(length)) = complete(rest) {
        assert!(length <= rest.len());
        if opener.open(&mut rest[..length]).is_err() {
            break;
        }
        rest = &mut rest[length..];
    }
    // Not that anyone would, but it must not matter.
    let _ = opener.open(&mut bytes);
}

fn secret(suite: u8) -> TrafficSecret {
    let suites = tls::provider().cipher_suites;
    let suite = suites[usize::from(suite) % suites.len()];
    let suite = suite.tls13().expect("a suite of TLS 1.3");
    TrafficSecret::new(suite, OkmBlock::new(&[7; 32])).expect("one of ours")
}
