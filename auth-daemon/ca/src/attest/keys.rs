//! The keys of an OIDC issuer (RFC 7517 §5), from a file or a server. They are read again when a token names an unknown
//! one.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{
        AlgorithmParameters, EllipticCurve, EllipticCurveKeyType, Jwk, KeyAlgorithm,
        OctetKeyPairType, PublicKeyUse, RSAKeyType,
    },
};
use serde_json::Value;
use tokio::sync::Mutex;

use super::fetch::fetch;
use crate::config::JwksSource;
use auth_support::files;

const MAX_BYTES: usize = 1 << 20;
const MAX_KEYS: usize = 64;
/// Age at which keys from a server are requested again.
const MAX_AGE: Duration = Duration::from_secs(300);
/// How often a server is asked at most, for tokens that name an unknown key.
const UNKNOWN_AGAIN: Duration = Duration::from_secs(10);
/// How often a server is asked at most until it has answered once, and how often a file is checked.
const FIRST_AGAIN: Duration = Duration::from_secs(1);

/// An issuer's keys.
#[derive(Debug)]
pub(super) struct Keys {
    source: JwksSource,
    current: ArcSwap<Vec<Key>>,
    reading: Mutex<Reading>,
}

#[derive(Debug, Default)]
struct Reading {
    /// What was read last.
    content: Vec<u8>,
    tried: Option<Instant>,
    read: Option<Instant>,
}

/// A key that may sign tokens.
#[derive(Clone, Debug)]
struct Key {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

impl Keys {
    /// Reads the keys of a file, and fails if it cannot. A server is asked when the first token arrives.
    pub(super) fn open(source: JwksSource) -> Result<Self, String> {
        let mut keys = Vec::new();
        if let JwksSource::File(path) = &source {
            let read = files::read(path, MAX_BYTES as u64).map_err(|error| error.to_string());
            keys = read
                .and_then(|content| parse(&content))
                .map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(Self {
            source,
            current: ArcSwap::from_pointee(keys),
            reading: Mutex::default(),
        })
    }

    /// The key with this `id`; without one, the only key for `algorithm`.
    pub(super) async fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Option<DecodingKey> {
        let known = self.lookup(id, algorithm);
        match (known, self.reading.try_lock()) {
            // Anybody can cause a read of the keys, with a token that names an unknown one. Others must not wait for that.
            (Some(known), Err(_)) => return Some(known),
            (Some(_), Ok(mut reading)) => self.read_if_due(&mut reading, false).await,
            (None, reading) => {
                drop(reading);
                self.read_if_due(&mut *self.reading.lock().await, true)
                    .await;
            }
        }
        self.lookup(id, algorithm)
    }

    fn lookup(&self, id: Option<&str>, algorithm: Algorithm) -> Option<DecodingKey> {
        let keys = self.current.load();
        let mut fitting = keys
            .iter()
            .filter(|key| key.algorithm == algorithm && (id.is_none() || key.id.as_deref() == id));
        let key = fitting.next()?;
        (id.is_some() || fitting.next().is_none()).then(|| key.key.clone())
    }

    /// Reads the keys if that is due.
    async fn read_if_due(&self, reading: &mut Reading, missed: bool) {
        let age = |at: Option<Instant>| at.map(|at| at.elapsed());
        if !due(&self.source, age(reading.tried), age(reading.read), missed) {
            return;
        }
        reading.tried = Some(Instant::now());
        match self.read(reading).await {
            Ok(keys) => {
                reading.read = Some(Instant::now());
                if let Some(keys) = keys {
                    tracing::info!(
                        source = self.name(),
                        keys = keys.len(),
                        "token issuer's keys read"
                    );
                    self.current.store(Arc::new(keys));
                }
            }
            Err(error) => tracing::error!(
                source = self.name(), %error, known = self.current.load().len(),
                "token issuer's keys cannot be read; keeping the known ones"
            ),
        }
    }

    fn name(&self) -> &str {
        match &self.source {
            JwksSource::File(path) => path.to_str().unwrap_or("a file"),
            JwksSource::Url { url, .. } => url,
        }
    }

    /// Returns `None` if they have not changed.
    async fn read(&self, reading: &mut Reading) -> Result<Option<Vec<Key>>, String> {
        let content = match &self.source {
            JwksSource::File(path) => {
                files::read(path, MAX_BYTES as u64).map_err(|error| error.to_string())?
            }
            JwksSource::Url { url, root_file } => {
                fetch(url, root_file.as_deref(), MAX_BYTES).await?
            }
        };
        if content == reading.content {
            return Ok(None);
        }
        let keys = parse(&content)?;
        reading.content = content;
        Ok(Some(keys))
    }
}

/// Whether to read the keys now. `tried` and `read` are the times since the last attempt and the last success; `missed`
/// means that a token names an unknown key.
fn due(source: &JwksSource, tried: Option<Duration>, read: Option<Duration>, missed: bool) -> bool {
    let (Some(tried), JwksSource::Url { .. }) = (tried, source) else {
        return tried.is_none_or(|tried| tried >= FIRST_AGAIN);
    };
    match read {
        None => tried >= FIRST_AGAIN,
        Some(read) => tried >= UNKNOWN_AGAIN && (missed || read >= MAX_AGE),
    }
}

/// The keys of a set that may sign tokens. Others are ignored (RFC 7517 §5); a set without any is an error.
fn parse(jwks: &[u8]) -> Result<Vec<Key>, String> {
    let set: Value =
        serde_json::from_slice(jwks).map_err(|_| "is not a JSON Web Key Set".to_owned())?;
    let keys = set["keys"]
        .as_array()
        .ok_or("is not a JSON Web Key Set: there is no list of keys")?;
    if keys.len() > MAX_KEYS {
        return Err(format!("has {} keys, more than {MAX_KEYS}", keys.len()));
    }
    let usable: Vec<_> = keys
        .iter()
        .filter_map(|key| usable(&serde_json::from_value(key.clone()).ok()?))
        .collect();
    if usable.is_empty() {
        return Err("has no key for RS256, ES256, ES384 or EdDSA".into());
    }
    Ok(usable)
}

/// The key determines the algorithm, not the token.
fn usable(jwk: &Jwk) -> Option<Key> {
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(rsa) if rsa.key_type == RSAKeyType::RSA => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(ec) if ec.key_type == EllipticCurveKeyType::EC => {
            match ec.curve {
                EllipticCurve::P256 => Algorithm::ES256,
                EllipticCurve::P384 => Algorithm::ES384,
                _ => return None,
            }
        }
        AlgorithmParameters::OctetKeyPair(pair)
            if pair.key_type == OctetKeyPairType::OctetKeyPair
                && pair.curve == EllipticCurve::Ed25519 =>
        {
            Algorithm::EdDSA
        }
        _ => return None,
    };
    let common = &jwk.common;
    let signs = matches!(common.public_key_use, None | Some(PublicKeyUse::Signature));
    let fits = common
        .key_algorithm
        .is_none_or(|named| named == KeyAlgorithm::from(algorithm));
    let key = DecodingKey::from_jwk(jwk).ok()?;
    (signs && fits).then(|| Key {
        id: common.key_id.clone(),
        algorithm,
        key,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use futures_util::FutureExt;

    use super::*;

    const EC: &str = r#"{"kty":"EC","crv":"P-256","kid":"one",
        "x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}"#;

    fn set(keys: &[&str]) -> Vec<u8> {
        format!("{{\"keys\":[{}]}}", keys.join(",")).into_bytes()
    }

    #[test]
    fn accepts_signing_keys_and_no_secrets() {
        let changed = |from: &str, to: &str| EC.replace(from, to);
        let keys = parse(&set(&[
            EC,
            r#"{"kty":"oct","k":"c2VjcmV0","kid":"secret","alg":"HS256"}"#,
            r#"{"kty":"new","kid":"x"}"#,
            "17",
            &changed("\"kid\"", "\"use\":\"enc\",\"kid\""),
            &changed("\"kid\"", "\"alg\":\"ES384\",\"kid\""),
            &changed("P-256", "P-521"),
        ]))
        .unwrap();
        assert_eq!(keys.len(), 1);
        assert_eq!(keys[0].algorithm, Algorithm::ES256);
        for bad in [&b"x"[..], b"{}", b"{\"keys\":[]}", b"{\"keys\":{}}"] {
            assert!(parse(bad).is_err());
        }
        assert!(parse(&set(&[EC; 65])).is_err());
    }

    #[test]
    fn limits_requests_to_a_server() {
        let file = JwksSource::File("/x".into());
        let server = JwksSource::Url {
            url: "https://x".into(),
            root_file: None,
        };
        let seconds = |s: u64| Some(Duration::from_secs(s));
        for (source, tried, read, missed, expected) in [
            (&server, None, None, false, true),
            (&server, seconds(0), None, true, false),
            (&server, seconds(1), None, false, true),
            (&server, seconds(9), seconds(9), true, false),
            (&server, seconds(10), seconds(10), true, true),
            (&server, seconds(10), seconds(10), false, false),
            (&server, seconds(300), seconds(300), false, true),
            (&server, seconds(9), seconds(309), true, false),
            (&file, seconds(0), seconds(0), true, false),
            (&file, seconds(1), seconds(1), false, true),
        ] {
            assert_eq!(
                due(source, tried, read, missed),
                expected,
                "{source:?} {tried:?} {read:?} {missed}"
            );
        }
    }

    #[tokio::test]
    async fn known_keys_are_found_while_others_wait_for_the_server() {
        let keys = Keys::open(JwksSource::Url {
            url: server(set(&[EC])),
            root_file: None,
        });
        let keys = keys.unwrap();
        assert!(keys.find(Some("one"), Algorithm::ES256).await.is_some());
        let _reading = keys.reading.lock().await;
        let known = keys.find(Some("one"), Algorithm::ES256).now_or_never();
        assert!(known.is_some_and(|key| key.is_some()));
        let unknown = keys.find(Some("two"), Algorithm::ES256).now_or_never();
        assert!(unknown.is_none());
    }

    /// Answers every request with `body`.
    fn server(body: Vec<u8>) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let head = format!(
                    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(head.as_bytes());
                let _ = stream.write_all(&body);
            }
        });
        url
    }

    #[tokio::test]
    async fn fetches_keys_within_bounds() {
        let keys = |body| {
            Keys::open(JwksSource::Url {
                url: server(body),
                root_file: None,
            })
            .unwrap()
        };
        let good = keys(set(&[EC]));
        assert!(good.find(Some("one"), Algorithm::ES256).await.is_some());
        assert!(good.find(None, Algorithm::ES256).await.is_some());
        assert!(good.find(Some("two"), Algorithm::ES256).await.is_none());
        assert!(good.find(Some("one"), Algorithm::RS256).await.is_none());
        let two = keys(set(&[EC, &EC.replace("one", "two")]));
        assert!(
            two.find(None, Algorithm::ES256).await.is_none(),
            "which one?"
        );
        assert!(two.find(Some("two"), Algorithm::ES256).await.is_some());
        let mut large = set(&[EC]);
        large.resize(MAX_BYTES + 1, b' ');
        assert!(
            keys(large)
                .find(Some("one"), Algorithm::ES256)
                .await
                .is_none()
        );
    }
}
