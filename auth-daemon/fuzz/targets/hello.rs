//! First bytes: never a panic, and what is decided stays decided when more comes.
#![no_main]

use auth_tunnel::{ALPN, hello::Opening, hello::classify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let whole = classify(bytes, ALPN);
    for length in 0..bytes.len() {
        let part = classify(&bytes[..length], ALPN);
        assert!(
            part == Opening::Undecided || part == whole,
            "{part:?} after {length} bytes, {whole:?} after all"
        );
    }
    if bytes.first().is_some_and(|first| *first != 22) {
        assert_eq!(whole, Opening::Plaintext);
    }
});
