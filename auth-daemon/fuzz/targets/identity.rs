//! SPIFFE IDs: never a panic; what parses is written as it was read, and its parts make it up.
#![no_main]

use auth_mesh::{Identity, TrustDomain};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, &str)| {
    let (complete, text) = input;
    // Half of the time the tail of something that begins well.
    let text = if complete {
        format!("spiffe://cluster.local/ns/{text}")
    } else {
        text.to_owned()
    };
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
});
