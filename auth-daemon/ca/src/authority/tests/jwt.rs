//! JWT-SVIDs, and the keys that sign them.

use auth_jwt::{Audience, JwtKeys, JwtSvid, Untrusted};

use super::{opening::intermediate, *};

fn sign(ca: &Authority) -> Result<String, Refusal> {
    let audience = Audience::try_from(vec!["db".to_owned()]).unwrap();
    let issued = ca.issue_jwt(&identity(WEB), &audience, "a")?;
    Ok(issued.token)
}

fn keys(ca: &Authority) -> JwtKeys {
    ca.published().borrow().jwt_keys.clone()
}

fn validate(token: &str, keys: &JwtKeys) -> Result<JwtSvid, Untrusted> {
    JwtSvid::validate(token, "db", |domain| {
        assert_eq!(domain.as_str(), "cluster.local");
        Some(keys.clone())
    })
}

fn unknown_key() -> Result<JwtSvid, Untrusted> {
    Err(Untrusted::Key("cluster.local".parse().unwrap()))
}

#[tokio::test]
async fn tokens_are_short_lived_and_only_for_those_who_get_certificates() {
    let (folder, clock, ca) = fresh().await;
    let svid = validate(&sign(&ca).unwrap(), &keys(&ca)).unwrap();
    assert_eq!(svid.id.as_str(), WEB);
    assert_eq!(svid.expires, clock.now() + 300);
    assert_eq!(
        (&svid.claims["aud"], &svid.claims["iat"]),
        (&json!(["db"]), &json!(clock.now()))
    );
    let revoked = [
        Target::Identity(identity(WEB)),
        Target::Node("a".to_owned()),
    ];
    for target in revoked {
        ca.revoke(target.clone(), Reason::KeyCompromise)
            .await
            .unwrap();
        assert!(matches!(sign(&ca), Err(Refusal::Revoked(_))), "{target}");
        ca.unrevoke(target).await.unwrap();
    }
    sign(&ca).unwrap();
    let audience = Audience::try_from(vec!["db".to_owned()]).unwrap();
    let foreign = ca.issue_jwt(
        &identity("spiffe://other/ns/default/sa/web"),
        &audience,
        "a",
    );
    assert!(matches!(foreign, Err(Refusal::Request(_))));
    drop(ca);
    let shorter = Settings {
        max_lifetime: Duration::from_secs(60),
        ..settings()
    };
    let ca = open_with(folder.path(), shorter, &clock).await;
    let svid = validate(&sign(&ca).unwrap(), &keys(&ca)).unwrap();
    assert_eq!(svid.expires, clock.now() + 60);
}

#[tokio::test]
async fn a_key_is_published_before_it_signs_and_until_its_last_token_has_expired() {
    let (folder, clock, ca) = fresh().await;
    let first = keys(&ca);
    ca.rotate_root().await.unwrap();
    let spreading = keys(&ca);
    assert_eq!(spreading.to_values().len(), 2);
    let old = sign(&ca).unwrap();
    validate(&old, &first).unwrap();
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    assert_eq!(keys(&ca), spreading, "over restarts");
    clock.pass(300);
    ca.do_due().await.unwrap();
    let new = sign(&ca).unwrap();
    assert_eq!(validate(&new, &first), unknown_key());
    validate(&new, &spreading).unwrap();
    validate(&old, &keys(&ca)).unwrap();
    clock.pass(DAY + 5);
    ca.do_due().await.unwrap();
    assert_eq!(ca.status().phase, "steady");
    assert_eq!(validate(&old, &keys(&ca)), unknown_key());
    validate(&new, &keys(&ca)).unwrap();
}

#[tokio::test]
async fn a_state_without_a_key_gets_one() {
    let (folder, clock, ca) = fresh().await;
    let before = keys(&ca);
    drop(ca);
    let file = folder.path().join("ca.json");
    let mut state: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let signer = state["signers"]["1"].as_object_mut().unwrap();
    assert!(signer.remove("jwtKey").is_some());
    std::fs::write(&file, state.to_string()).unwrap();
    let ca = open_with(folder.path(), settings(), &clock).await;
    assert!(keys(&ca) != before);
    validate(&sign(&ca).unwrap(), &keys(&ca)).unwrap();
}

#[tokio::test]
async fn another_intermediate_keeps_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let settings = |files: &tempfile::TempDir| intermediate(files.path());
    let [one, two] = [settings(&one), settings(&two)];
    // After the certificates, which are valid from now on.
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), one, &clock).await;
    let token = sign(&ca).unwrap();
    drop(ca);
    let ca = open_with(folder.path(), two, &clock).await;
    validate(&token, &keys(&ca)).unwrap();
    assert_eq!(keys(&ca).to_values().len(), 1);
}
