//! First bytes: never a panic, and what is decided stays decided when more comes.

use auth_tunnel::{ALPN, hello::FirstBytes, hello::classify};

pub(super) fn run(bytes: &[u8]) {
    let whole = classify(bytes, ALPN);
    for length in 0..bytes.len() {
        let part = classify(&bytes[..length], ALPN);
        assert!(
            part == FirstBytes::Undecided || part == whole,
            "{part:?} after {length} bytes, {whole:?} after all"
        );
    }
    if bytes.first().is_some_and(|first| *first != 22) {
        assert_eq!(whole, FirstBytes::Plaintext);
    }
}
