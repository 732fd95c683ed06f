//! New roots.

use super::*;

#[tokio::test]
async fn rotates_the_root_over_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let mut ca = open_with(folder.path(), settings(), &clock).await;
    let hour = Duration::from_secs(3600);
    let old = ca
        .issue(&identity(WEB), &csr(), hour, Some("a"))
        .await
        .unwrap();
    let first = ca.published().borrow().clone();
    assert_eq!((first.roots.len(), first.phase.as_str()), (1, "steady"));

    let phase = ca.rotate_root().await.unwrap();
    assert!(phase.starts_with("spreading"), "{phase}");
    let error = ca.rotate_root().await.unwrap_err();
    assert!(error.to_string().contains("under way"), "{error}");
    let spread = ca.published().borrow().clone();
    assert_eq!((spread.roots.len(), spread.crls.len()), (2, 2));
    assert_eq!(spread.roots[0], first.roots[0], "the old one signs");
    let between = ca.issue(&identity(WEB), &csr(), hour, None).await.unwrap();
    verifies(&between, &first, clock.now()).unwrap();
    ca.inner.catch_up().await.unwrap();
    assert_eq!(ca.status()["phase"], "spreading");

    for restart in [true, false] {
        if restart {
            drop(ca);
            ca = open_with(folder.path(), settings(), &clock).await;
            assert_eq!(ca.published().borrow().roots, spread.roots);
        }
    }
    // The server's own certificate under the old root counts, too.
    clock.pass(299);
    ca.inner.catch_up().await.unwrap();
    ca.serving_certificate(&["ca".into()]).unwrap();
    let end = clock.now() + DAY;
    assert_eq!(ca.status()["phase"], "spreading");
    clock.pass(1);
    ca.inner.catch_up().await.unwrap();
    let status = ca.status();
    assert_eq!(status["phase"], "retiring");
    assert_eq!(status["phaseEnds"], crate::tunnel::tls::rfc3339(end + 5));
    let retiring = ca.published().borrow().clone();
    assert_eq!(
        retiring.roots,
        [spread.roots[1].clone(), spread.roots[0].clone()]
    );
    let new = ca.issue(&identity(WEB), &csr(), hour, None).await.unwrap();
    assert_eq!(ca.issued(&serial(&new)).unwrap().signer, 2);
    for chain in [&old, &between, &new] {
        verifies(chain, &retiring, clock.now()).unwrap();
    }
    // Those who have heard of the new root only, and of the new one alone.
    verifies(&new, &spread, clock.now()).unwrap();
    assert!(verifies(&new, &first, clock.now()).is_err());
    // The old root's list still works.
    ca.revoke(Target::Serial(serial(&old)), Reason::Superseded)
        .await
        .unwrap();
    let published = ca.published().borrow().clone();
    assert!(
        verifies(&old, &published, clock.now())
            .unwrap_err()
            .contains("certificate revoked")
    );
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    assert_eq!(ca.status()["phase"], "retiring");
    while clock.now() < end + 5 {
        assert_eq!(ca.published().borrow().roots.len(), 2);
        let due = ca.inner.catch_up().await.unwrap();
        assert!(due > clock.now());
        clock.pass((due - clock.now()).min(end + 5 - clock.now()));
    }
    ca.inner.catch_up().await.unwrap();
    let last = ca.published().borrow().clone();
    assert_eq!(
        (last.phase.as_str(), &last.roots[..]),
        ("steady", &spread.roots[1..])
    );
    assert_eq!(last.crls.len(), 1);
    let state = std::fs::read_to_string(folder.path().join("ca.json")).unwrap();
    assert_eq!(state.matches("PRIVATE KEY").count(), 2, "one key is left");
    let roots = folder.path().join("root-cert.pem");
    assert_eq!(std::fs::read_to_string(&roots).unwrap(), all(&last.roots));
    assert_eq!(std::fs::metadata(roots).unwrap().mode() & 0o777, 0o644);
    let mode = std::fs::metadata(folder.path().join("ca.json"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn replaces_a_root_before_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let ca = open_with(folder.path(), settings(), &clock).await;
    clock.pass(800 * DAY - 1);
    ca.inner.catch_up().await.unwrap();
    assert_eq!(ca.status()["phase"], "steady");
    clock.pass(1);
    ca.inner.catch_up().await.unwrap();
    assert_eq!(ca.status()["phase"], "spreading");
    // Even if both have ended while the CA was away.
    clock.pass(5000 * DAY);
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    ca.inner.catch_up().await.unwrap();
    clock.pass(60);
    ca.inner.catch_up().await.unwrap();
    let published = ca.published().borrow().clone();
    let chain = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, None)
        .await
        .unwrap();
    assert_eq!(ca.issued(&serial(&chain)).unwrap().signer, 3);
    verifies(&chain, &published, clock.now()).unwrap();
}

#[tokio::test]
async fn keeps_up_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings();
    settings.root = Root::SelfSigned {
        algorithm: KeyAlgorithm::P256,
        lifetime: Duration::from_secs(DAY),
        spread: Duration::from_secs(1),
    };
    settings.max_lifetime = Duration::from_secs(10);
    let store = Arc::new(DirectoryStore::open(folder.path()).unwrap());
    let ca = Authority::open(store, settings).await.unwrap();
    let background = ca.clone();
    let task = tokio::spawn(async move { background.keep_up().await });
    let mut published = ca.published();
    ca.rotate_root().await.unwrap();
    let retiring = published.wait_for(|published| published.phase.starts_with("retiring"));
    tokio::time::timeout(Duration::from_secs(30), retiring)
        .await
        .unwrap()
        .unwrap();
    task.abort();
}
