//! Writing PEM (RFC 7468).

use pem::{EncodeConfig, LineEnding, Pem};
use rustls::pki_types::CertificateDer;

/// `der` as one block of type `label`.
pub fn encode(label: &str, der: &[u8]) -> String {
    let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
    pem::encode_config(&Pem::new(label, der), config)
}

/// A certificate as one block.
pub fn certificate(der: &[u8]) -> String {
    encode("CERTIFICATE", der)
}

/// Certificates as one block each.
pub fn certificates(ders: &[CertificateDer<'_>]) -> String {
    ders.iter().map(|der| certificate(der)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::pki_types::pem::PemObject;

    use super::*;

    proptest! {
        #[test]
        fn is_read_back(der in prop::collection::vec(any::<u8>(), 0..300)) {
            let text = certificate(&der);
            let read = CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
            prop_assert_eq!(read.as_ref(), &der[..]);
            prop_assert!(text.lines().all(|line| line.len() <= 64));
        }
    }
}
