//! Join tokens and nodes' certificates over time, and over restarts.

use super::*;
use crate::attest::{Attestor as _, Caller, Credentials, certificate::Certificates};

const MINUTE: Duration = Duration::from_secs(60);

fn csr_of(key: &KeyPair) -> Vec<u8> {
    let csr = CertificateParams::default().serialize_request(key).unwrap();
    csr.der().to_vec()
}

async fn token(ca: &Arc<Authority>) -> String {
    ca.create_join_token("vm", MINUTE, true, None)
        .await
        .unwrap()
}

async fn join(ca: &Arc<Authority>, token: &str, key: &KeyPair) -> Result<Vec<u8>, String> {
    let joined = ca.join(token, &csr_of(key), Duration::ZERO).await;
    let (node, issued) = joined.map_err(|refusal| refusal.to_string())?;
    assert_eq!(node, "vm");
    Ok(issued.chain[0].to_vec())
}

#[tokio::test]
async fn an_expired_token_joins_nobody_and_an_expired_certificate_is_not_renewed() {
    let (_folder, clock, ca) = fresh().await;
    let key = KeyPair::generate().unwrap();
    let late = token(&ca).await;
    clock.pass(60);
    let error = join(&ca, &late, &key).await.unwrap_err();
    assert!(error.contains("expired"), "{error}");
    assert_eq!(ca.status().joined_nodes.len(), 0);
    assert_eq!(ca.status().join_tokens.len(), 1);
    ca.do_due().await.unwrap();
    assert_eq!(ca.status().join_tokens.len(), 0, "and audited");

    let certificate = join(&ca, &token(&ca).await, &key).await.unwrap();
    let until = || ca.status().joined_nodes[0].certificate_until.clone();
    assert_eq!(until(), Some(rfc3339(clock.now() + DAY)));
    clock.pass(DAY - 1);
    let renewed = ca.renew_node(&certificate, &csr_of(&key), Duration::ZERO);
    let renewed = renewed.unwrap().chain[0].to_vec();
    assert_eq!(until(), Some(rfc3339(clock.now() + DAY)));
    clock.pass(1);
    let expired = ca.renew_node(&certificate, &csr_of(&key), Duration::ZERO);
    let error = expired.unwrap_err().to_string();
    assert!(error.contains("needs a new join token"), "{error}");
    ca.node(&renewed).unwrap();
    // That of one key does not renew another one's.
    let other = KeyPair::generate().unwrap();
    let other = ca.renew_node(&renewed, &csr_of(&other), Duration::ZERO);
    assert!(other.is_err());
    let serial = Svid::parse(&renewed, &TrustDomain::default());
    assert!(serial.is_err(), "no workload's");
}

#[tokio::test]
async fn a_machine_outlives_the_root_under_which_it_joined() {
    let (_folder, clock, ca) = fresh().await;
    let key = KeyPair::generate().unwrap();
    let mut held = join(&ca, &token(&ca).await, &key).await.unwrap();
    let first = ca.published().borrow().roots.clone();
    ca.rotate_root().await.unwrap();
    let mut phases = vec![];
    // It renews in time, and no more often than it must.
    for _ in 0..5 {
        clock.pass(DAY / 2);
        ca.do_due().await.unwrap();
        phases.push(ca.status().phase);
        let renewed = ca.renew_node(&held, &csr_of(&key), Duration::ZERO).unwrap();
        held = renewed.chain[0].to_vec();
        assert!(ca.view.load().issued(&held));
    }
    assert!(phases.contains(&"retiring".into()), "{phases:?}");
    assert_eq!(phases.last().unwrap(), "steady");
    assert!(!ca.published().borrow().roots.contains(&first[0]));
    ca.node(&held).unwrap();
}

#[tokio::test]
async fn a_machine_outlives_the_intermediate_under_which_it_joined() {
    let folder = tempfile::tempdir().unwrap();
    let plugged_in = || {
        let files = tempfile::tempdir().unwrap();
        crate::intermediate::tests::istio(files.path());
        let root = Root::Intermediate(files.path().to_owned());
        let settings = Settings { root, ..settings() };
        (files, settings)
    };
    let (_files, first) = plugged_in();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), first, &clock).await;
    let key = KeyPair::generate().unwrap();
    let before = join(&ca, &token(&ca).await, &key).await.unwrap();
    drop(ca);
    let (_files, second) = plugged_in();
    clock.pass(60);
    let ca = open_with(folder.path(), second, &clock).await;
    assert!(!ca.view.load().issued(&before), "by the former one");
    let renewed = ca.renew_node(&before, &csr_of(&key), Duration::ZERO);
    let renewed = renewed.unwrap();
    assert!(ca.view.load().issued(&renewed.chain[0]));
    let thief = KeyPair::generate().unwrap();
    let error = ca.renew_node(&before, &csr_of(&thief), Duration::ZERO);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("not the one"), "{error}");
}

#[tokio::test]
async fn certificates_that_the_pods_of_a_machine_before_got_are_not_renewed() {
    let (_folder, clock, ca) = fresh().await;
    let attestor = Certificates::new(watch::channel(Some(ca.clone())).1);
    let attest = async |chain: &[CertificateDer<'static>]| {
        let credentials = Credentials {
            bearer: None,
            certificate: Some(&chain[0]),
        };
        attestor.attest(credentials).await.unwrap()
    };
    let is_of = |caller, expected: &str| matches!(caller, Ok(Caller::Workload { node, .. }) if node == expected);
    let secret = token(&ca).await;
    join(&ca, &secret, &KeyPair::generate().unwrap())
        .await
        .unwrap();
    let vm = || Target::Node("vm".into());
    for revoked in [false, true] {
        let stolen = issue(&ca, "web", "vm").unwrap();
        let elsewhere = issue(&ca, "web", "a").unwrap();
        assert!(is_of(attest(&stolen).await, "vm"));
        clock.pass(1);
        if revoked {
            ca.revoke(vm(), Reason::KeyCompromise).await.unwrap();
            ca.unrevoke(vm()).await.unwrap();
        }
        let secret = token(&ca).await;
        join(&ca, &secret, &KeyPair::generate().unwrap())
            .await
            .unwrap();
        let error = attest(&stolen).await.unwrap_err().0;
        assert!(error.contains("before the present machine"), "{error}");
        assert!(is_of(attest(&elsewhere).await, "a"));
        assert!(is_of(attest(&issue(&ca, "web", "vm").unwrap()).await, "vm"));
    }
}

#[tokio::test]
async fn a_repeated_answer_changes_nothing_and_a_bad_request_does_not_use_the_token_up() {
    let (_folder, _clock, ca) = fresh().await;
    let key = KeyPair::generate().unwrap();
    let secret = token(&ca).await;
    let request = csr_of(&key);
    let short = ca.join(&secret, &request, Duration::from_secs(1));
    let error = short.await.unwrap_err().to_string();
    assert!(error.contains("lifetime"), "{error}");
    assert_eq!(ca.status().join_tokens.len(), 1);
    join(&ca, &secret, &key).await.unwrap();
    let version = ca.status().version;
    join(&ca, &secret, &key).await.unwrap();
    assert_eq!(ca.status().version, version);
    // Who replaces the machine makes a new key.
    let replacing = token(&ca).await;
    let error = join(&ca, &replacing, &key).await.unwrap_err();
    assert!(error.contains("make a new one"), "{error}");
    assert_eq!(ca.status().join_tokens.len(), 1);
}

#[tokio::test]
async fn an_expired_token_does_not_block_its_name() {
    let (_folder, clock, ca) = fresh().await;
    token(&ca).await;
    let again = ca.create_join_token("vm", MINUTE, true, None).await;
    assert!(again.unwrap_err().to_string().contains("already"));
    clock.pass(60);
    let secret = token(&ca).await;
    let key = KeyPair::generate().unwrap();
    join(&ca, &secret, &key).await.unwrap();
}

#[tokio::test]
async fn the_next_leader_knows_tokens_and_joined_machines() {
    let (folder, clock, ca) = fresh().await;
    let (key, thief) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let secret = token(&ca).await;
    let state = std::fs::read_to_string(folder.path().join("ca.json")).unwrap();
    assert!(!state.contains(&secret), "only the hash is stored");
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    let certificate = join(&ca, &secret, &key).await.unwrap();
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    ca.node(&certificate).unwrap();
    let error = join(&ca, &secret, &thief).await.unwrap_err();
    assert!(error.contains("with another key"), "{error}");
    // The leader may have stopped before its answer arrived.
    join(&ca, &secret, &key).await.unwrap();
    drop(ca);

    // The name has a token of its own now; or the API server says which pods run where.
    for (taken_nodes, expected) in [
        (Some(["vm".to_owned()].into()), "attestation.tokens"),
        (None, "asks the API server"),
    ] {
        let settings = Settings {
            taken_nodes,
            ..settings()
        };
        let ca = open_with(folder.path(), settings, &clock).await;
        let error = ca.node(&certificate).unwrap_err();
        assert!(error.contains(expected), "{error}");
        let error = ca.create_join_token("vm", MINUTE, true, None).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_tokens_lifetime_is_bounded() {
    let (_folder, _clock, ca) = fresh().await;
    for seconds in [1, 59, 3601] {
        let lifetime = Duration::from_secs(seconds);
        let error = ca.create_join_token("vm", lifetime, false, None).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("lifetime"), "{error}");
    }
}
