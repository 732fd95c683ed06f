//! The CA's state in Secrets.

use std::time::Duration;

use auth_daemon::ca::{
    authority::IssuedRecord,
    store::{Kept, Store, StoreError, secret::SecretStore},
};
use futures_util::future::join_all;
use kube::Client;
use mesh_tests::Kubernetes;
use serde_json::{Value, json};

use crate::{NAMESPACE, as_ca, cluster};

fn record(number: u32, not_after: u64) -> IssuedRecord {
    let mut serial = [0x40; 16];
    serial[12..].copy_from_slice(&number.to_be_bytes());
    IssuedRecord {
        serial,
        not_after,
        signer: 1,
        identity: format!(
            "spiffe://cluster.local/ns/default/sa/account-{}",
            number % 100
        )
        .parse()
        .unwrap(),
        node: number
            .is_multiple_of(2)
            .then(|| format!("node-{}", number % 10)),
    }
}

fn store(client: &Client, name: &str) -> SecretStore {
    SecretStore::new(client.clone(), NAMESPACE, name)
}

async fn load(client: &Client, name: &str) -> (SecretStore, Kept) {
    let store = store(client, name);
    let kept = store.load().await.unwrap().unwrap();
    (store, kept)
}

fn path(name: &str) -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/secrets/{name}")
}

fn segments(cluster: &Kubernetes, name: &str) -> Vec<Value> {
    let path = format!(
        "/api/v1/namespaces/{NAMESPACE}/secrets?labelSelector=auth-daemon.io/ca-state%3D{name},\
         auth-daemon.io/ca-part%3Dissued"
    );
    let list = cluster.get(&path).unwrap().unwrap();
    list["items"].as_array().unwrap().clone()
}

fn sorted(mut records: Vec<IssuedRecord>) -> Vec<IssuedRecord> {
    records.sort_by_key(|record| record.serial);
    records
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_is_there_for_the_next_one() {
    let Some((cluster, client)) = cluster("what_was_kept_is_there_for_the_next_one").await else {
        return;
    };
    let first = store(&client, "kept");
    assert!(first.load().await.unwrap().is_none());
    let early = first.record(&[record(0, 9)]).await.unwrap_err().0;
    assert!(early.contains("before there is a root"), "{early}");
    first.keep(b"one").await.unwrap();
    // At once: they share commits, and fill more than one segment.
    let all: Vec<_> = (0..3000).map(|n| record(n, 1000 + u64::from(n))).collect();
    for half in all.chunks(1500) {
        let outcomes = join_all(half.chunks(3).map(|some| first.record(some))).await;
        outcomes.into_iter().collect::<Result<(), _>>().unwrap();
    }
    first.keep(b"two").await.unwrap();
    assert!(segments(&cluster, "kept").len() > 2);

    let (second, kept) = load(&client, "kept").await;
    assert_eq!(kept.core, b"two");
    assert_eq!(sorted(kept.issued), all);
    second.record(&[record(3000, 5000)]).await.unwrap();

    // Whoever wrote before writes no more, neither this nor that, and says why.
    let refused = first.keep(b"three").await.unwrap_err().0;
    assert!(refused.contains("by somebody else"), "{refused}");
    assert!(*first.lost().borrow());
    assert!(!*second.lost().borrow());
    let (third, kept) = load(&client, "kept").await;
    assert_eq!(
        (kept.core.as_slice(), kept.issued.len()),
        (&b"two"[..], 3001)
    );
    let refused = second.record(&[record(1, 9)]).await.unwrap_err().0;
    assert!(refused.contains("by somebody else"), "{refused}");
    assert!(*second.lost().borrow());

    // What has ended goes, with its Secret; the segment that grows stays.
    let before = segments(&cluster, "kept").len();
    third.prune(2500).await.unwrap();
    assert!(segments(&cluster, "kept").len() < before);
    let (fourth, kept) = load(&client, "kept").await;
    let lives = |record: &IssuedRecord| record.not_after >= 2500;
    assert_eq!(kept.issued.iter().filter(|r| lives(r)).count(), 1501);
    fourth.prune(u64::MAX).await.unwrap();
    assert_eq!(segments(&cluster, "kept").len(), 1);
    load(&client, "kept").await;

    let secret = cluster.get(&path("kept")).unwrap().unwrap();
    assert_eq!(secret["type"], "Opaque");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_begin_at_once_make_one_state() {
    let Some((_cluster, client)) = cluster("two_that_begin_at_once_make_one_state").await else {
        return;
    };
    let stores: Vec<_> = (0..8).map(|_| store(&client, "race")).collect();
    for store in &stores {
        assert!(store.load().await.unwrap().is_none());
    }
    let names: Vec<_> = (0..8).map(|n| format!("root {n}")).collect();
    let kept = join_all(
        stores
            .iter()
            .zip(&names)
            .map(|(s, name)| s.keep(name.as_bytes())),
    )
    .await;
    let won: Vec<_> = (0..8).filter(|n| kept[*n].is_ok()).collect();
    let [won] = won[..] else {
        panic!("{kept:?}");
    };
    let (_, kept) = load(&client, "race").await;
    assert_eq!(kept.core, names[won].as_bytes());
}

/// A writer that was replaced between any two of its writes: what the next one loaded stays whole and its own.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_replaced_writer_gets_in() {
    let Some((_cluster, client)) = cluster("nothing_of_a_replaced_writer_gets_in").await else {
        return;
    };
    let begin = store(&client, "fence");
    begin.load().await.unwrap();
    begin.keep(b"core").await.unwrap();
    let mut sure = Vec::new();
    let mut number = 0;
    for _ in 0..4 {
        let (old, kept) = load(&client, "fence").await;
        for record in &sure {
            assert!(kept.issued.contains(record), "{record:?} was lost");
        }
        // Both write as fast as they can.
        let old_writes = async {
            let mut written = Vec::new();
            loop {
                number += 1;
                let record = record(number, 1 << 40);
                match old.record(std::slice::from_ref(&record)).await {
                    Ok(()) => written.push(record),
                    Err(StoreError(why)) => return (written, why),
                }
            }
        };
        let new_loads = async {
            tokio::time::sleep(Duration::from_millis(150)).await;
            load(&client, "fence").await
        };
        let ((written, why), (_new, kept)) = tokio::join!(old_writes, new_loads);
        assert!(why.contains("by somebody else"), "{why}");
        assert!(!written.is_empty());
        for record in &written {
            assert!(
                kept.issued.contains(record),
                "{record:?} is not known to the next one"
            );
        }
        sure.extend(written);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_is_not_whole_is_not_begun_anew() {
    let Some((cluster, client)) = cluster("a_state_that_is_not_whole_is_not_begun_anew").await
    else {
        return;
    };
    let begin = store(&client, "broken");
    begin.load().await.unwrap();
    begin.keep(b"core").await.unwrap();
    begin.record(&[record(1, 1 << 40)]).await.unwrap();
    let refused = async |what: &str| {
        let error = store(&client, "broken").load().await.unwrap_err().0;
        assert!(error.contains(what), "{error}");
    };
    let set = |name: &str, key: &str, base64: &str| {
        let change = json!({"data": {key: base64}});
        cluster.merge(&path(name), &change).unwrap();
    };
    let good = cluster.get(&path("broken-issued-0")).unwrap().unwrap();
    set("broken-issued-0", "issued", "AAAA");
    refused(&format!(
        "Secret {NAMESPACE}/broken-issued-0: is damaged at byte 0"
    ))
    .await;
    set(
        "broken-issued-0",
        "issued",
        good["data"]["issued"].as_str().unwrap(),
    );
    set("broken", "format", "OTk=");
    refused(&format!(
        "Secret {NAMESPACE}/broken: is damaged, or of another version"
    ))
    .await;
    set("broken", "format", "MQ==");
    // An old core was restored.
    set("broken", "segments", "MA==");
    refused("is newer than the CA's own Secret").await;
    set("broken", "segments", "MQ==");
    assert_eq!(load(&client, "broken").await.1.issued, [record(1, 1 << 40)]);
    cluster.delete(&path("broken")).unwrap();
    refused("is there, but the CA's own Secret is not").await;
    // Somebody else's Secret.
    let foreign = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "foreign"}, "stringData": {"core": "x"},
    });
    cluster
        .create(&format!("/api/v1/namespaces/{NAMESPACE}/secrets"), &foreign)
        .unwrap();
    let error = store(&client, "foreign").load().await.unwrap_err().0;
    assert!(error.contains("is not the state of this CA"), "{error}");
    // Deleted under the leader's hands.
    let begin = store(&client, "gone");
    begin.load().await.unwrap();
    begin.keep(b"core").await.unwrap();
    cluster.delete(&path("gone")).unwrap();
    begin.keep(b"core").await.unwrap_err();
    assert!(*begin.lost().borrow());
    // More than a Secret holds.
    let begin = store(&client, "long");
    begin.load().await.unwrap();
    begin.keep(&vec![7; 900 << 10]).await.unwrap();
    let error = begin.keep(&vec![7; 1 << 20]).await.unwrap_err().0;
    assert!(error.contains("1048576 bytes of at most"), "{error}");
    assert_eq!(load(&client, "long").await.1.core.len(), 900 << 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_late_or_lost_is_no_conflict() {
    let test = "an_answer_that_is_late_or_lost_is_no_conflict";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return;
    }
    let cluster = Kubernetes::start().unwrap();
    let client = as_ca(&cluster).await;
    let first = store(&client, "late");
    first.load().await.unwrap();
    first.keep(b"one").await.unwrap();
    first.record(&[record(1, 1 << 40)]).await.unwrap();
    // The request is on its way when the API server stops answering; it is carried out when nobody waits any more.
    cluster.freeze(true).unwrap();
    let error = first.keep(b"two").await.unwrap_err().0;
    assert!(
        error.contains("the API server") || error.contains("not done within"),
        "{error}"
    );
    let error = first.record(&[record(2, 1 << 40)]).await.unwrap_err().0;
    assert!(
        error.contains("the API server") || error.contains("not done within"),
        "{error}"
    );
    cluster.freeze(false).unwrap();
    first.keep(b"three").await.unwrap();
    first.record(&[record(3, 1 << 40)]).await.unwrap();
    assert!(!*first.lost().borrow());
    cluster.stop_server().unwrap();
    let error = first.keep(b"four").await.unwrap_err().0;
    assert!(
        error.contains("the API server cannot be reached"),
        "{error}"
    );
    cluster.start_server().unwrap();
    first.keep(b"five").await.unwrap();
    let (_, kept) = load(&client, "late").await;
    assert_eq!(kept.core, b"five");
    for expected in [record(1, 1 << 40), record(3, 1 << 40)] {
        assert!(kept.issued.contains(&expected));
    }
}
