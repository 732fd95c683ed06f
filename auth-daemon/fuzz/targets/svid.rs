//! Certificates: never a panic, on noise and on a good one with bytes changed; and what is an SVID is one of ours.
#![no_main]

use auth_tunnel::tls::svid::Svid;
use libfuzzer_sys::fuzz_target;

/// Of spiffe://cluster.local/ns/default/sa/web.
const GOOD: &[u8] = include_bytes!("../seeds/svid/web.der");

fuzz_target!(|input: (Vec<(u16, u8)>, &[u8])| {
    let (changes, noise) = input;
    parse(noise);
    let mut certificate = GOOD.to_vec();
    for (offset, value) in changes {
        let offset = usize::from(offset) % certificate.len();
        certificate[offset] = value;
    }
    parse(&certificate);
    certificate.extend_from_slice(noise);
    parse(&certificate);
});

fn parse(der: &[u8]) {
    match Svid::parse(der, "cluster.local") {
        Ok(svid) => {
            assert_eq!(svid.identity.trust_domain(), "cluster.local");
            assert!(svid.serial.bytes().all(|b| b.is_ascii_hexdigit()));
        }
        // It goes into the log, one line.
        Err(error) => assert!(
            !error.to_string().chars().any(char::is_control),
            "{error:?}"
        ),
    }
}
