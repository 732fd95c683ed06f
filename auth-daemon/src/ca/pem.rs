//! Writing PEM (RFC 7468).

use rustls::pki_types::CertificateDer;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// `der` as one block of type `label`.
pub fn encode(label: &str, der: &[u8]) -> String {
    let mut out = format!("-----BEGIN {label}-----\n");
    // 48 bytes are a line of 64 characters.
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let mut bytes = [0; 4];
            bytes[1..=group.len()].copy_from_slice(group);
            let bits = u32::from_be_bytes(bytes);
            for digit in 0..4 {
                out.push(if digit <= group.len() {
                    char::from(ALPHABET[(bits >> (18 - 6 * digit) & 0x3f) as usize])
                } else {
                    '='
                });
            }
        }
        out.push('\n');
    }
    out + &format!("-----END {label}-----\n")
}

/// The same for a certificate.
pub fn certificate(der: &[u8]) -> String {
    encode("CERTIFICATE", der)
}

/// One block for each certificate.
pub fn certificates(ders: &[CertificateDer<'_>]) -> String {
    ders.iter().map(|der| certificate(der)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::pki_types::{CertificateDer, pem::PemObject};

    use super::*;

    proptest! {
        #[test]
        fn is_read_back(der in prop::collection::vec(any::<u8>(), 0..300)) {
            let pem = certificate(&der);
            let read = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
            prop_assert_eq!(read.as_ref(), &der[..]);
            prop_assert!(pem.lines().all(|line| line.len() <= 64));
        }
    }
}
