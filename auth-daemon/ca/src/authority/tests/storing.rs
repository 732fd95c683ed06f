//! Crashes, full disks, and concurrent writers.

use std::sync::Mutex;

use super::*;
use crate::store::directory::tests::{Failures, open_failing};

#[tokio::test]
async fn a_crash_between_any_two_steps_loses_nothing() {
    for steps in 0.. {
        let folder = tempfile::tempdir().unwrap();
        let clock = FakeClock::new();
        let first = open_with(folder.path(), settings(), &clock).await;
        let root = first.published().borrow().roots[0].clone();
        let mut seen = first.published().borrow().version;
        drop(first);
        let failures = Failures::crash_after(steps);
        let store = Arc::new(open_failing(folder.path(), &failures));
        // What the CA confirmed in its short life.
        let (mut revoked, mut phase) = (false, 0);
        if let Ok(ca) = Authority::open_at(store, settings(), clock.clock()).await {
            let node = Target::Node("b".into());
            revoked = ca.revoke(node, Reason::KeyCompromise).await.is_ok();
            phase = u32::from(ca.rotate_root().await.is_ok());
            clock.pass(300);
            if ca.do_due().await.is_ok() && phase == 1 {
                phase = 2;
            }
            seen = ca.published().borrow().version;
        }
        let ca = open_with(folder.path(), settings(), &clock).await;
        let published = ca.published().borrow().clone();
        assert!(published.version > seen, "after {steps} steps");
        assert!(
            !revoked || published.revoked.nodes.len() == 1,
            "after {steps} steps"
        );
        let phases = ["steady", "spreading", "retiring"];
        let found = phases.iter().position(|name| ca.status().phase == *name);
        assert!(
            found >= Some(phase as usize),
            "{found:?} after {steps} steps, not {phase}"
        );
        assert!(published.roots.contains(&root));
        let chain = issue(&ca, "web", "a").unwrap();
        verifies(&chain, &published, clock.now()).unwrap();
        let files = std::fs::read_dir(folder.path()).unwrap();
        let mut names = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(!names.any(|name| name.contains("draft")));
        if !failures.crashed() {
            assert!(steps > 10, "all steps were tried");
            return;
        }
    }
}

#[tokio::test]
async fn a_full_disk_refuses_changes_but_not_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let clock = FakeClock::new();
    let failures = Failures::default();
    let store = Arc::new(open_failing(folder.path(), &failures));
    let ca = Authority::open_at(store, settings(), clock.clock())
        .await
        .unwrap();
    let before = (ca.published().borrow().clone(), ca.status());
    let state = || std::fs::read(folder.path().join("ca.json")).unwrap();
    let stored = state();
    let node = Target::Node("a".into());
    failures.fill_disk(true);
    let error = ca
        .revoke(node.clone(), Reason::Unspecified)
        .await
        .unwrap_err();
    assert!(matches!(error, Refusal::Store(_)) && error.to_string().contains("Make room"));
    ca.rotate_root().await.unwrap_err();
    let after = (ca.published().borrow().clone(), ca.status());
    assert_eq!(after, before, "nothing is half applied");
    assert_eq!(state(), stored);
    let chain = issue(&ca, "web", "a").unwrap();
    failures.fill_disk(false);
    ca.revoke(node, Reason::Unspecified).await.unwrap();
    drop(ca);
    let ca = open_with(folder.path(), settings(), &clock).await;
    ca.verify(&chain[0]).unwrap_err();
}

/// A document that several CAs share, as a Secret is: a writer fails once another one has read it.
#[derive(Clone)]
struct Shared(Arc<Mutex<Document>>, Arc<Mutex<u32>>);

/// The number of the last reader, and the content.
type Document = (u32, Option<Vec<u8>>);

#[tonic::async_trait]
impl Store for Shared {
    async fn load(&self) -> Result<Stored, StoreError> {
        let mut shared = self.0.lock().unwrap();
        shared.0 += 1;
        *self.1.lock().unwrap() = shared.0;
        Ok(shared.1.clone().map_or(Stored::Nothing, Stored::State))
    }

    async fn replace(&self, state: &[u8]) -> Result<(), StoreError> {
        let mut shared = self.0.lock().unwrap();
        if *self.1.lock().unwrap() != shared.0 {
            return Err(StoreError("another CA is active".into()));
        }
        shared.1 = Some(state.to_vec());
        Ok(())
    }
}

#[tokio::test]
async fn a_replaced_writer_cannot_revoke_and_changes_nothing() {
    let first_store = Shared(Arc::default(), Arc::default());
    let second_store = Shared(first_store.0.clone(), Arc::default());
    let open = |store| Authority::open(Arc::new(store), settings());
    let first = open(first_store.clone()).await.unwrap();
    let (api, web) = (Target::Node("api".into()), Target::Identity(identity(WEB)));
    first.revoke(api, Reason::Superseded).await.unwrap();
    let second = open(second_store).await.unwrap();
    let error = first
        .revoke(web.clone(), Reason::KeyCompromise)
        .await
        .unwrap_err();
    assert!(matches!(&error, Refusal::Store(_)), "{error}");
    assert!(
        first.published().borrow().revoked.identities.is_empty(),
        "not applied"
    );
    second.revoke(web, Reason::KeyCompromise).await.unwrap();
    let third = open(Shared(first_store.0, Arc::default())).await.unwrap();
    let revoked = third.published().borrow().revoked.clone();
    assert_eq!((revoked.nodes.len(), revoked.identities.len()), (1, 1));
}
