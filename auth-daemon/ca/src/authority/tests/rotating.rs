//! Root rotation.

use super::*;

#[tokio::test]
async fn rotates_the_root_over_restarts_and_knows_when_the_last_certificate_expires() {
    let (folder, clock, ca) = fresh().await;
    let old = issue(&ca, "web", "a").unwrap();
    let first = ca.published().borrow().clone();
    assert_eq!((first.roots.len(), first.phase.as_str()), (1, "steady"));

    let phase = ca.rotate_root().await.unwrap();
    assert!(phase.starts_with("spreading"), "{phase}");
    let error = ca.rotate_root().await.unwrap_err();
    assert!(error.to_string().contains("in progress"), "{error}");
    let spread = ca.published().borrow().clone();
    assert_eq!((spread.roots.len(), spread.crls.len()), (2, 2));
    assert_eq!(spread.roots[0], first.roots[0], "the old one signs");
    drop(ca);
    // With shorter lifetimes from now on, the longer ones of before still count.
    let shorter = || Settings {
        max_lifetime: Duration::from_secs(3600),
        ..settings()
    };
    let ca = open_with(folder.path(), shorter(), &clock).await;
    assert_eq!(ca.published().borrow().roots, spread.roots);
    clock.pass(299);
    ca.do_due().await.unwrap();
    assert_eq!(ca.status().phase, "spreading");
    let last = issue(&ca, "web", "a").unwrap();
    verifies(&last, &first, clock.now()).unwrap();

    clock.pass(1);
    let end = clock.now() + DAY;
    ca.do_due().await.unwrap();
    let status = ca.status();
    assert_eq!(status.phase, "retiring");
    assert_eq!(status.phase_ends, Some(rfc3339(end + 5)));
    let retiring = ca.published().borrow().clone();
    assert_eq!(
        retiring.roots,
        [spread.roots[1].clone(), spread.roots[0].clone()]
    );
    let new = issue(&ca, "web", "a").unwrap();
    for chain in [&old, &last, &new] {
        verifies(chain, &retiring, clock.now()).unwrap();
        ca.verify(&chain[0]).unwrap();
    }
    verifies(&new, &spread, clock.now()).unwrap();
    assert!(
        verifies(&new, &first, clock.now()).is_err(),
        "signed by the new root"
    );
    // The old root's list still works.
    let target = Target::Serial(serial(&old));
    ca.revoke(target, Reason::Superseded).await.unwrap();
    let published = ca.published().borrow().clone();
    let error = verifies(&old, &published, clock.now()).unwrap_err();
    assert!(error.contains("certificate revoked"), "{error}");
    drop(ca);
    let ca = open_with(folder.path(), shorter(), &clock).await;
    assert_eq!(ca.status().phase, "retiring");
    while clock.now() < end + 5 {
        assert_eq!(ca.published().borrow().roots.len(), 2);
        let due = ca.do_due().await.unwrap();
        assert!(due > clock.now());
        clock.pass(due.min(end + 5) - clock.now());
    }
    ca.do_due().await.unwrap();
    let last = ca.published().borrow().clone();
    assert_eq!(
        (last.phase.as_str(), &last.roots[..]),
        ("steady", &spread.roots[1..])
    );
    assert_eq!(last.crls.len(), 1);
    let state = folder.path().join("ca.json");
    let text = std::fs::read_to_string(&state).unwrap();
    assert_eq!(
        text.matches("PRIVATE KEY").count(),
        4,
        "the keys of one signer"
    );
    let roots = folder.path().join("root-cert.pem");
    let written = std::fs::read_to_string(&roots).unwrap();
    assert_eq!(written, pem::certificates(&last.roots));
    for (file, mode) in [(roots, 0o644), (state, 0o600)] {
        assert_eq!(std::fs::metadata(file).unwrap().mode() & 0o777, mode);
    }
}

#[tokio::test]
async fn replaces_a_root_before_it_expires() {
    let (folder, clock, ca) = fresh().await;
    clock.pass(800 * DAY - 1);
    ca.do_due().await.unwrap();
    assert_eq!(ca.status().phase, "steady");
    clock.pass(1);
    ca.do_due().await.unwrap();
    assert_eq!(ca.status().phase, "spreading");
    // Even if both have expired while the CA was down.
    clock.pass(5000 * DAY);
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    for _ in 0..5 {
        ca.do_due().await.unwrap();
        clock.pass(DAY + 300);
    }
    ca.do_due().await.unwrap();
    let published = ca.published().borrow().clone();
    let chain = issue(&ca, "web", "a").unwrap();
    verifies(&chain, &published, clock.now()).unwrap();
}

#[tokio::test]
async fn advances_automatically() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings();
    settings.root = Root::SelfSigned(RootSettings {
        lifetime: Duration::from_secs(DAY),
        spread: Duration::from_secs(1),
        ..roots()
    });
    settings.max_lifetime = Duration::from_secs(10);
    let store = Arc::new(DirectoryStore::open(folder.path()).unwrap());
    let ca = Authority::open(store, settings).await.unwrap();
    let background = ca.clone();
    let task = tokio::spawn(async move { background.run().await });
    let mut published = ca.published();
    ca.rotate_root().await.unwrap();
    let retiring = published.wait_for(|published| published.phase.starts_with("retiring"));
    let waited = tokio::time::timeout(Duration::from_secs(30), retiring).await;
    waited.unwrap().unwrap();
    task.abort();
}
