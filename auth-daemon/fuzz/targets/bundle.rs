//! Bundle documents of other trust domains: never a panic, and what is read is written and read again unchanged.

use auth_federation::Bundle;

pub(super) fn run(input: &[u8]) {
    let _ = Bundle::of_file(input);
    let Ok(bundle) = Bundle::parse(input) else {
        return;
    };
    // JWKs have no form for some keys that a root may have.
    if let Ok(document) = bundle.to_json() {
        assert_eq!(Bundle::parse(document.as_bytes()), Ok(bundle));
    }
}
