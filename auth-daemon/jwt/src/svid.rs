//! Validation of tokens, which anybody may have written.

use auth_mesh::{InvalidIdentity, SpiffeId, TrustDomain};
use jsonwebtoken::{
    Validation, dangerous,
    errors::{Error, ErrorKind},
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::JwtKeys;

/// Maximum length of a token, in bytes.
pub const MAX_TOKEN: usize = 8 << 10;
/// How far clocks may differ, in seconds: a token is accepted for so long after its expiry, and before it becomes valid.
const LEEWAY: u64 = 5;

/// A token that was valid when it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct JwtSvid {
    /// The SPIFFE ID that it proves.
    pub id: SpiffeId,
    /// When it expires, in seconds since the Unix epoch.
    pub expires: u64,
    /// All claims, including the ID and the expiry.
    pub claims: Map<String, Value>,
}

/// Why a token is not accepted. Contains no secret: of the token itself only the names of trust domains and claims.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Untrusted {
    /// It is too long.
    #[error("the token is longer than {MAX_TOKEN} bytes")]
    TooLong,
    /// It is not a signed JWT, or is signed with an algorithm that no JWT-SVID has, such as `none` or one with a shared
    /// secret.
    #[error(
        "the token is not a JWT in compact form that is signed with ES256, ES384, RS256 to RS512 or PS256 to PS512"
    )]
    Malformed,
    /// Its header has another type than JWT, or demands an extension that must be understood (RFC 7515 §4.1.11).
    #[error("the token's header has {0}, which no JWT-SVID has")]
    Header(&'static str),
    /// A claim is missing, or does not have the form that JWT-SVIDs require.
    #[error("the token's claim {0} is missing or malformed")]
    Claim(String),
    /// Its subject is not a SPIFFE ID.
    #[error("the token's subject is not a SPIFFE ID: {0}")]
    Subject(#[from] InvalidIdentity),
    /// No key of its trust domain is known.
    #[error("the token is of trust domain {0}, and no key that verifies its JWT-SVIDs is known")]
    TrustDomain(TrustDomain),
    /// It names no key, or one that its trust domain does not publish for this algorithm.
    #[error("the token is not signed with a key that trust domain {0} publishes")]
    Key(TrustDomain),
    /// The signature does not match.
    #[error("the token's signature is wrong")]
    Signature,
    /// It has expired.
    #[error("the token has expired; request a new one, and check the clocks (NTP)")]
    Expired,
    /// It is not valid yet.
    #[error("the token is not valid yet; check the clocks (NTP)")]
    Early,
    /// It is for somebody else.
    #[error("the token is for another audience")]
    Audience,
}

/// The only claim that is read before the signature is verified, because it selects the keys.
#[derive(Deserialize)]
struct Unverified {
    sub: String,
}

impl JwtSvid {
    /// Validates `token` for a recipient with the name `audience` (JWT-SVID §5). `keys` returns the keys of a trust domain, or
    /// `None` if the trust domain is not trusted.
    pub fn validate(
        token: &str,
        audience: &str,
        keys: impl FnOnce(&TrustDomain) -> Option<JwtKeys>,
    ) -> Result<Self, Untrusted> {
        if token.len() > MAX_TOKEN {
            return Err(Untrusted::TooLong);
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| Untrusted::Malformed)?;
        if !matches!(header.typ.as_deref(), None | Some("JWT" | "JOSE")) {
            return Err(Untrusted::Header("another typ"));
        }
        if header.crit.is_some() {
            return Err(Untrusted::Header("crit"));
        }
        let unverified: Result<Unverified, _> = dangerous::insecure_decode_claims(token);
        let id: SpiffeId = match unverified {
            Ok(claims) => claims.sub.parse()?,
            Err(_) => return Err(Untrusted::Claim("sub".into())),
        };
        let domain = id.trust_domain();
        let keys = keys(domain).ok_or_else(|| Untrusted::TrustDomain(domain.clone()))?;
        let key = header.kid.and_then(|kid| keys.find(&kid, header.alg));
        let key = key.ok_or_else(|| Untrusted::Key(domain.clone()))?;
        let mut validation = Validation::new(header.alg);
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["aud", "exp", "sub"]);
        validation.sub = Some(id.as_str().to_owned());
        validation.validate_nbf = true;
        validation.leeway = LEEWAY;
        let verified = jsonwebtoken::decode::<Map<String, Value>>(token, &key, &validation)
            .map_err(|error| Untrusted::from(&error))?;
        let claims = verified.claims;
        // Fractions are allowed (RFC 7519 §2).
        let expires = claims.get("exp").and_then(Value::as_f64);
        let expires = expires.ok_or_else(|| Untrusted::Claim("exp".into()))?;
        Ok(Self {
            id,
            expires: expires as u64,
            claims,
        })
    }
}

impl From<&Error> for Untrusted {
    fn from(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::ExpiredSignature => Self::Expired,
            ErrorKind::ImmatureSignature => Self::Early,
            ErrorKind::InvalidAudience => Self::Audience,
            ErrorKind::InvalidSignature => Self::Signature,
            ErrorKind::InvalidSubject => Self::Claim("sub".into()),
            ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
                Self::Claim(claim.clone())
            }
            _ => Self::Malformed,
        }
    }
}

#[cfg(test)]
mod tests {
    use auth_mesh::Identity;
    use jsonwebtoken::{Algorithm, EncodingKey, Header, get_current_timestamp as now, jwk::Jwk};
    use proptest::prelude::*;
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256};
    use serde_json::json;

    use super::*;
    use crate::{Audience, SigningKey};

    const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

    /// A key, in the form that the CA uses, and in the form that signs anything.
    struct Signer {
        key: SigningKey,
        raw: EncodingKey,
    }

    impl Signer {
        fn new() -> Self {
            let pair = KeyPair::generate().unwrap();
            Self {
                key: SigningKey::from_pem(&pair.serialize_pem()).unwrap(),
                raw: EncodingKey::from_ec_der(&pair.serialize_der()),
            }
        }

        fn keys(&self) -> JwtKeys {
            [&self.key].into_iter().collect()
        }

        fn header(&self) -> Header {
            Header {
                kid: self.key.public().common.key_id.clone(),
                ..Header::new(Algorithm::ES256)
            }
        }

        /// A valid token, except for a change of its header and claims.
        fn changed(&self, change: impl FnOnce(&mut Header, &mut Value)) -> String {
            let mut header = self.header();
            let mut claims = json!({"sub": WEB, "aud": ["x", "y"], "exp": now() + 300});
            change(&mut header, &mut claims);
            jsonwebtoken::encode(&header, &claims, &self.raw).unwrap()
        }

        fn validate(&self, token: &str) -> Result<JwtSvid, Untrusted> {
            JwtSvid::validate(token, "x", |domain| {
                (domain.as_str() == "cluster.local").then(|| self.keys())
            })
        }
    }

    fn audience(names: &[&str]) -> Audience {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        names.try_into().unwrap()
    }

    #[test]
    fn what_is_signed_is_valid_for_its_audiences_until_it_expires() {
        let signer = Signer::new();
        let web: Identity = WEB.parse().unwrap();
        let sign = |issued: u64, expires: u64| {
            let token = signer
                .key
                .sign(&web, &audience(&["x", "y"]), issued, expires);
            token.unwrap()
        };
        let token = sign(now(), now() + 300);
        let svid = signer.validate(&token).unwrap();
        assert_eq!(svid.id.as_str(), WEB);
        assert_eq!(svid.claims["aud"], json!(["x", "y"]));
        assert!(svid.expires > now() && svid.expires <= now() + 300);
        let header = jsonwebtoken::decode_header(&token).unwrap();
        assert_eq!(header.typ.as_deref(), Some("JWT"));
        assert_eq!(
            (header.alg, header.kid),
            (Algorithm::ES256, signer.header().kid)
        );
        let other = JwtSvid::validate(&token, "z", |_| Some(signer.keys()));
        assert_eq!(other, Err(Untrusted::Audience));
        let expired = sign(now() - 300, now() - LEEWAY - 1);
        assert_eq!(signer.validate(&expired), Err(Untrusted::Expired));
        let unknown = JwtSvid::validate(&token, "x", |_| None);
        assert!(matches!(unknown, Err(Untrusted::TrustDomain(_))));
    }

    #[test]
    fn refuses_hostile_tokens() {
        let (signer, other) = (Signer::new(), Signer::new());
        let good = signer.changed(|_, _| {});
        signer.validate(&good).unwrap();
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let key = Untrusted::Key(domain);
        let claim = |name: &str| Untrusted::Claim(name.into());
        let [head, body, signature] = good.split('.').collect::<Vec<_>>()[..] else {
            panic!("three parts");
        };
        // {"alg":"none"}
        let none = "eyJhbGciOiJub25lIn0";
        let public = signer.keys().to_values()[0]["x"]
            .as_str()
            .unwrap()
            .to_owned();
        let secret = EncodingKey::from_secret(public.as_bytes());
        let mut hmac = signer.header();
        hmac.alg = Algorithm::HS256;
        let claims = json!({"sub": WEB, "aud": "x", "exp": now() + 300});
        let hmac = jsonwebtoken::encode(&hmac, &claims, &secret).unwrap();
        let with =
            |name: &'static str, value: Value| signer.changed(|_, claims| claims[name] = value);
        let without = |name: &'static str| {
            signer.changed(|_, claims| drop(claims.as_object_mut().unwrap().remove(name)))
        };
        for (token, expected) in [
            (String::new(), Untrusted::Malformed),
            ("x.y.z".into(), Untrusted::Malformed),
            (format!("{none}.{body}."), Untrusted::Malformed),
            (format!("{none}.{body}.{signature}"), Untrusted::Malformed),
            (format!("{good}.x"), Untrusted::Malformed),
            (format!("{head}.{body}."), Untrusted::Signature),
            (format!("{head}.{body}.{signature}A"), Untrusted::Signature),
            (hmac, key.clone()),
            (other.changed(|_, _| {}), key.clone()),
            (
                other.changed(|header, _| *header = signer.header()),
                Untrusted::Signature,
            ),
            (signer.changed(|header, _| header.kid = None), key.clone()),
            (
                signer.changed(|header, _| header.typ = Some("at+jwt".into())),
                Untrusted::Header("another typ"),
            ),
            (
                signer.changed(|header, _| header.crit = Some(vec!["exp".into()])),
                Untrusted::Header("crit"),
            ),
            (without("sub"), claim("sub")),
            (without("exp"), claim("exp")),
            (without("aud"), claim("aud")),
            (with("sub", json!([WEB])), claim("sub")),
            (with("sub", "web".into()), InvalidIdentity::Scheme.into()),
            (with("exp", "soon".into()), claim("exp")),
            (with("exp", json!(-1)), claim("exp")),
            (with("aud", json!({})), claim("aud")),
            (with("aud", json!([])), Untrusted::Audience),
            (with("aud", "xy".into()), Untrusted::Audience),
            (with("nbf", (now() + 60).into()), Untrusted::Early),
            (
                with("sub", "spiffe://other/x".into()),
                Untrusted::TrustDomain("other".parse().unwrap()),
            ),
            ("x".repeat(MAX_TOKEN + 1), Untrusted::TooLong),
        ] {
            let refused = signer.validate(&token);
            assert_eq!(refused, Err(expected), "{token}");
        }
    }

    #[test]
    fn fractions_of_seconds_are_seconds() {
        let signer = Signer::new();
        let token = signer.changed(|_, claims| claims["exp"] = json!(4_000_000_000.5));
        assert_eq!(signer.validate(&token).unwrap().expires, 4_000_000_000);
    }

    #[test]
    fn tokens_of_other_issuers_are_valid_with_each_algorithm() {
        let (p256, p384) = (&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384);
        for (algorithm, kind) in [
            (Algorithm::ES256, p256),
            (Algorithm::ES384, p384),
            (Algorithm::RS256, &PKCS_RSA_SHA256),
            (Algorithm::RS384, &PKCS_RSA_SHA256),
            (Algorithm::RS512, &PKCS_RSA_SHA256),
            (Algorithm::PS256, &PKCS_RSA_SHA256),
            (Algorithm::PS384, &PKCS_RSA_SHA256),
            (Algorithm::PS512, &PKCS_RSA_SHA256),
        ] {
            let pem = KeyPair::generate_for(kind).unwrap().serialize_pem();
            let raw = match kind == &PKCS_RSA_SHA256 {
                true => EncodingKey::from_rsa_pem(pem.as_bytes()),
                false => EncodingKey::from_ec_pem(pem.as_bytes()),
            };
            let raw = raw.unwrap();
            let mut key = serde_json::to_value(Jwk::from_encoding_key(&raw, algorithm).unwrap());
            key.as_mut().unwrap()["kid"] = "k".into();
            let mut keys = JwtKeys::default();
            keys.add(&key.unwrap().to_string());
            let header = Header {
                typ: Some("JOSE".into()),
                kid: Some("k".into()),
                ..Header::new(algorithm)
            };
            let claims = json!({"sub": "spiffe://far/x", "aud": "x", "exp": now() + 300});
            let token = jsonwebtoken::encode(&header, &claims, &raw).unwrap();
            let validate = |token: &str| JwtSvid::validate(token, "x", |_| Some(keys.clone()));
            assert_eq!(validate(&token).unwrap().id.as_str(), "spiffe://far/x");
            let other = json!({"sub": "spiffe://far/y", "aud": "x", "exp": now() + 300});
            let other = jsonwebtoken::encode(&header, &other, &raw).unwrap();
            let (signed, signature) = (
                token.rsplit_once('.').unwrap().0,
                other.rsplit_once('.').unwrap().1,
            );
            assert_eq!(
                validate(&format!("{signed}.{signature}")),
                Err(Untrusted::Signature)
            );
        }
    }

    proptest! {
        /// Whatever is changed in a token: it is refused, or it is the same token.
        #[test]
        fn never_panics(text in "\\PC{0,64}", at in 0usize..400, byte in "[A-Za-z0-9_.=-]") {
            let signer = Signer::new();
            prop_assert!(signer.validate(&text).is_err());
            let good = signer.changed(|_, _| {});
            let mut changed = good.clone();
            let at = at % good.len();
            changed.replace_range(at..=at, &byte);
            prop_assert_eq!(signer.validate(&changed).is_ok(), changed == good);
        }
    }
}
