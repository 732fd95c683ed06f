//! Crashes and full disks.

use super::*;

/// What a CA does in a short life. Returns what it was told was done.
async fn live_through(ca: &Authority, clock: &FakeClock) -> (Vec<[u8; 16]>, bool, u32) {
    let mut issued = Vec::new();
    let mut issue = async || {
        if let Ok(chain) = ca
            .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
            .await
        {
            issued.push(serial(&chain));
        }
    };
    issue().await;
    let revoked = ca
        .revoke(Target::Node("b".into()), Reason::KeyCompromise)
        .await
        .is_ok();
    let mut phase = u32::from(ca.rotate_root().await.is_ok());
    clock.pass(300);
    if ca.inner.catch_up().await.is_ok() && phase == 1 {
        phase = 2;
    }
    issue().await;
    (issued, revoked, phase)
}

#[tokio::test]
async fn a_crash_between_any_two_steps_loses_nothing() {
    for steps in 0.. {
        let folder = tempfile::tempdir().unwrap();
        let clock = FakeClock::new();
        let first = open_with(folder.path(), settings(), &clock).await;
        let root = first.published().borrow().roots[0].clone();
        let version = first.published().borrow().version;
        drop(first);
        let faults = Faults::crash_after(steps);
        let disk = Disk {
            faults: faults.clone(),
        };
        let store = Arc::new(DirectoryStore::open_on(folder.path(), disk).unwrap());
        let mut done = (Vec::new(), false, 0);
        let mut shown = version;
        if let Ok(ca) = Authority::open_at(store, settings(), clock.clock()).await {
            done = live_through(&ca, &clock).await;
            shown = ca.published().borrow().version;
        }
        let ca = open_with(folder.path(), settings(), &clock).await;
        let (issued, revoked, phase) = done;
        for serial in issued {
            assert!(ca.issued(&serial).is_some(), "after {steps} steps");
        }
        let published = ca.published().borrow().clone();
        assert!(published.version > shown, "after {steps} steps");
        assert!(
            !revoked || published.nodes.len() == 1,
            "after {steps} steps"
        );
        let found = match ca.status()["phase"].as_str().unwrap() {
            "steady" => 0,
            "spreading" => 1,
            "retiring" => 2,
            other => panic!("{other}"),
        };
        assert!(
            found >= phase,
            "{found} after {steps} steps, but {phase} was told"
        );
        assert!(published.roots.contains(&root));
        let chain = ca
            .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
            .await
            .unwrap();
        verifies(&chain, &published, clock.now()).unwrap();
        let left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains("draft"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        if !faults.crashed() {
            assert!(steps > 20, "all of it was tried");
            return;
        }
    }
}

#[tokio::test]
async fn a_full_disk_stops_what_would_not_last() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let faults = Faults::default();
    let disk = Disk {
        faults: faults.clone(),
    };
    let store = Arc::new(DirectoryStore::open_on(folder.path(), disk).unwrap());
    let ca = Authority::open_at(store, settings(), clock.clock())
        .await
        .unwrap();
    let first = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
        .await
        .unwrap();
    let before = (ca.published().borrow().clone(), ca.status());
    faults.fill(true);
    for _ in 0..3 {
        let error = ca
            .issue(&identity(WEB), &csr(), Duration::ZERO, None)
            .await
            .unwrap_err();
        assert!(matches!(&error, Refusal::Store(_)), "{error}");
        assert!(
            error.to_string().contains("issued.journal") && error.to_string().contains("Make room"),
            "{error}"
        );
        let error = ca
            .revoke(Target::Node("a".into()), Reason::Unspecified)
            .await
            .unwrap_err();
        assert!(matches!(error, Refusal::Store(_)), "{error}");
        ca.rotate_root().await.unwrap_err();
    }
    assert_eq!(
        (ca.published().borrow().clone(), ca.status()),
        before,
        "nothing half-applied"
    );
    let record = ca.issued(&serial(&first)).unwrap();
    ca.check(&record).unwrap();
    faults.fill(false);
    let second = ca
        .issue(&identity(WEB), &csr(), Duration::ZERO, Some("a"))
        .await
        .unwrap();
    assert_eq!(
        ca.revoke(Target::Node("a".into()), Reason::Unspecified)
            .await
            .unwrap(),
        2
    );
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    for chain in [&first, &second] {
        let record = ca.issued(&serial(chain)).unwrap();
        ca.check(&record).unwrap_err();
    }
}
