//! SPIFFE IDs: never a panic; what parses is written as it was read, and its parts make it up.

use auth_mesh::{Identity, TrustDomain};

pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    judge(text);
    // The same as the tail of something that begins well.
    judge(&format!("spiffe://cluster.local/ns/{text}"));
}

fn judge(text: &str) {
    let _ = text.parse::<TrustDomain>();
    match text.parse::<Identity>() {
        Ok(identity) => {
            assert_eq!(identity.as_str(), text);
            let domain: TrustDomain = identity.trust_domain().parse().expect("part of an ID");
            let again = domain.identity(identity.namespace(), identity.service_account());
            assert_eq!(again.as_ref(), Ok(&identity));
            assert!(text.is_ascii() && text.len() <= 2048);
        }
        Err(error) => assert!(
            !error.to_string().chars().any(char::is_control),
            "{error:?}"
        ),
    }
}
