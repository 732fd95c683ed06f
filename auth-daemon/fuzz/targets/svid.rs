//! Certificates: never a panic, on noise and on a good one with bytes changed; and what is an SVID is one of ours.

use auth_mesh::TrustDomain;
use auth_tunnel::tls::svid::{NodeCertificate, Svid};

/// Of spiffe://cluster.local/ns/default/sa/web.
const GOOD: &[u8] = include_bytes!("../seeds/svid/web.der");

pub(super) fn run(input: &[u8]) {
    parse(input);
    // Three bytes each: where the good certificate is changed, and to what.
    let mut certificate = GOOD.to_vec();
    let (changes, noise) = input.as_chunks::<3>();
    for [high, low, value] in changes {
        let offset = usize::from(u16::from_be_bytes([*high, *low])) % certificate.len();
        certificate[offset] = *value;
    }
    parse(&certificate);
    certificate.extend_from_slice(noise);
    parse(&certificate);
}

fn parse(der: &[u8]) {
    let node = NodeCertificate::parse(der, &TrustDomain::default());
    match Svid::parse(der, &TrustDomain::default()) {
        Ok(svid) => {
            assert!(node.is_err(), "a workload's and a node's");
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
