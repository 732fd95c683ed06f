//! Bearer tokens: never a panic, nobody is identified by what the issuer has not signed, and whoever is runs on a node.

use std::{
    fs,
    sync::{Arc, LazyLock},
};

use auth_ca::{
    attest::{Attestor, Caller, Credentials, jwks::Jwks},
    config::{JwksAttestation, JwksSource, OidcIssuer},
};
use auth_mesh::{Inventory, ObjectName, Registry, Snapshot, TrustDomain, Workload};
use futures_util::FutureExt;
use jsonwebtoken::{Algorithm, EncodingKey, Header, jwk::Jwk};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

struct Issuer {
    key: EncodingKey,
    attestor: Jwks,
    runtime: Runtime,
    /// Holds the issuer's public key.
    _folder: tempfile::TempDir,
}

static ISSUER: LazyLock<Issuer> = LazyLock::new(|| {
    let key = rcgen::KeyPair::generate().expect("a key");
    let key = EncodingKey::from_ec_der(&key.serialize_der());
    let jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).expect("a public key");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("keys.json");
    fs::write(&path, json!({"keys": [jwk]}).to_string()).expect("a file");
    let registry = Registry::new();
    let web = |name: &str| ObjectName {
        namespace: "default".into(),
        name: name.into(),
    };
    registry.publish(Snapshot::new(Inventory {
        workloads: vec![Workload {
            uid: "u1".into(),
            node: "a".into(),
            ..Workload::new(
                web("web-0"),
                "spiffe://cluster.local/ns/default/sa/web"
                    .parse()
                    .expect("an ID"),
            )
        }],
        services: vec![],
    }));
    let config = JwksAttestation {
        issuer: OidcIssuer {
            issuer: "https://issuer.example".into(),
            audience: "ca".into(),
            source: JwksSource::File(path),
        },
        node_service_account: Some(web("daemon")),
    };
    Issuer {
        key,
        attestor: Jwks::open(config, TrustDomain::default(), Arc::new(registry))
            .expect("usable keys"),
        runtime: Runtime::new().expect("a runtime"),
        _folder: folder,
    }
});

pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    assert!(attest(text).is_none(), "not signed by the issuer");
    let Ok(mut claims) = serde_json::from_str::<Value>(text) else {
        return;
    };
    // Seeds do not know the time.
    if let Some(exp @ Value::String(_)) = claims.get_mut("exp") {
        *exp = (jsonwebtoken::get_current_timestamp() + 600).into();
    }
    let signed = jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &ISSUER.key);
    match signed.ok().and_then(|token| attest(&token)) {
        Some(Caller::Node { node }) => assert!(!node.is_empty()),
        Some(Caller::Workload { identity, node }) => {
            assert!(!node.is_empty() && identity.trust_domain() == "cluster.local");
        }
        Some(caller @ Caller::Person { .. }) => panic!("{caller} by a workload's token"),
        None => {}
    }
}

/// The caller that a token identifies at once, without waiting for a pod that is not known yet.
fn attest(token: &str) -> Option<Caller> {
    let _runtime = ISSUER.runtime.enter();
    let credentials = Credentials {
        bearer: Some(token),
        certificate: None,
    };
    match ISSUER.attestor.attest(credentials).now_or_never()?? {
        Ok(caller) => Some(caller),
        Err(refused) => {
            assert!(!refused.to_string().chars().any(char::is_control));
            None
        }
    }
}
