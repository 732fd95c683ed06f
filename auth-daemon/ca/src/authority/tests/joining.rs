//! Join tokens and nodes' certificates over time, and over restarts.

use super::*;

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
    assert_eq!(ca.status().join_tokens.len(), 1);
    ca.do_due().await.unwrap();
    assert_eq!(ca.status().join_tokens.len(), 0, "and audited");

    let certificate = join(&ca, &token(&ca).await, &key).await.unwrap();
    clock.pass(DAY - 1);
    let renewed = ca.renew_node(&certificate, &csr_of(&key), Duration::ZERO);
    let renewed = renewed.unwrap().chain[0].to_vec();
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
    ca.rotate_root().await.unwrap();
    ca.node(&renewed).unwrap();
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
    assert!(join(&ca, &secret, &thief).await.is_err());
    // The leader may have stopped before its answer arrived.
    join(&ca, &secret, &key).await.unwrap();
    drop(ca);

    // The name has a token of its own now; or the API server says which pods run where.
    for taken_nodes in [Some(["vm".to_owned()].into()), None] {
        let settings = Settings {
            taken_nodes,
            ..settings()
        };
        let ca = open_with(folder.path(), settings, &clock).await;
        assert!(ca.node(&certificate).is_err());
        assert!(
            ca.create_join_token("vm", MINUTE, true, None)
                .await
                .is_err()
        );
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
