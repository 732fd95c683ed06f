//! JWT-SVIDs and keys of foreign trust domains: never a panic, and nothing is valid but what one of the keys has signed.

use std::sync::LazyLock;

use auth_jwt::{JwtKeys, JwtSvid, MAX_TOKEN, SigningKey};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::Value;

struct Signer {
    key: EncodingKey,
    header: Header,
    keys: JwtKeys,
}

static SIGNER: LazyLock<Signer> = LazyLock::new(|| {
    let pair = rcgen::KeyPair::generate().expect("a key");
    let signing = SigningKey::from_pem(&pair.serialize_pem()).expect("a usable key");
    let keys: JwtKeys = [&signing].into_iter().collect();
    let id = keys.to_values()[0]["kid"].as_str().map(str::to_owned);
    Signer {
        key: EncodingKey::from_ec_der(&pair.serialize_der()),
        header: Header {
            kid: id,
            ..Header::new(Algorithm::ES256)
        },
        keys,
    }
});

pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if let Ok(keys) = JwtKeys::parse(text) {
        assert_eq!(JwtKeys::parse(&keys.to_json()), Ok(keys));
    }
    assert_eq!(validate(text), None, "not signed");
    let Ok(mut claims) = serde_json::from_str::<Value>(text) else {
        return;
    };
    // Seeds do not know the time.
    if let Some(exp @ Value::String(_)) = claims.get_mut("exp") {
        *exp = (jsonwebtoken::get_current_timestamp() + 600).into();
    }
    let token = jsonwebtoken::encode(&SIGNER.header, &claims, &SIGNER.key).expect("a token");
    if let Some(svid) = validate(&token) {
        assert_eq!(svid.id.trust_domain().as_str(), "cluster.local");
        assert_eq!(claims["sub"], svid.id.as_str());
        let audience = &claims["aud"];
        let is_x = |audience: &Value| audience == "x";
        assert!(is_x(audience) || audience.as_array().is_some_and(|all| all.iter().any(is_x)));
        assert!(token.len() <= MAX_TOKEN);
    }
}

/// What a token proves to `x`.
fn validate(token: &str) -> Option<JwtSvid> {
    let validated = JwtSvid::validate(token, "x", |domain| {
        (domain.as_str() == "cluster.local").then(|| SIGNER.keys.clone())
    });
    match validated {
        Ok(svid) => Some(svid),
        Err(refused) => {
            assert!(!refused.to_string().chars().any(char::is_control));
            None
        }
    }
}
