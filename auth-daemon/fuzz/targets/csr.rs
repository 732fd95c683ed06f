//! Certificate requests: never a panic, and what is accepted has a key of a supported kind.

use auth_ca::csr::RequestedKey;

pub(super) fn run(csr: &[u8]) {
    if let Ok(requested) = RequestedKey::from_csr(csr) {
        assert!(!requested.spki().is_empty());
    }
}
