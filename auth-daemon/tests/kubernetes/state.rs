//! The CA's state in a Secret.

use std::time::Duration;

use auth_ca::store::{Store, Stored, secret::SecretStore};
use futures_util::future::join_all;
use kube::Client;
use mesh_tests::Kubernetes;
use serde_json::json;
use tokio::sync::watch;

use crate::{NAMESPACE, as_ca, cluster};

fn store(client: &Client, name: &str) -> SecretStore {
    SecretStore::new(client.clone(), NAMESPACE, name)
}

async fn load(client: &Client, name: &str) -> (SecretStore, Vec<u8>) {
    let store = store(client, name);
    match store.load().await.unwrap() {
        Stored::State(state) => (store, state),
        other => panic!("{other:?}"),
    }
}

fn path(name: &str) -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/secrets/{name}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_writer_reads_the_state_and_stops_the_earlier_one() {
    let Some((cluster, client)) =
        cluster("a_new_writer_reads_the_state_and_stops_the_earlier_one").await
    else {
        return;
    };
    let first = store(&client, "kept");
    let early = first.replace(b"zero").await.unwrap_err().0;
    assert!(early.contains("has not been read"), "{early}");
    assert_eq!(first.load().await.unwrap(), Stored::Nothing);
    first.replace(b"one").await.unwrap();
    first.replace(b"two").await.unwrap();

    let (second, state) = load(&client, "kept").await;
    assert_eq!(state, b"two");
    let refused = first.replace(b"three").await.unwrap_err().0;
    assert!(refused.contains("another CA is active"), "{refused}");
    assert!(*first.lost().borrow() && !*second.lost().borrow());
    second.replace(b"four").await.unwrap();
    first.load().await.unwrap_err();
    let (_third, state) = load(&client, "kept").await;
    assert_eq!(state, b"four");
    let secret = cluster.get(&path("kept")).unwrap().unwrap();
    assert_eq!(secret["type"], "Opaque");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_that_start_together_one_creates_the_state() {
    let Some((_cluster, client)) =
        cluster("of_several_that_start_together_one_creates_the_state").await
    else {
        return;
    };
    let stores: Vec<_> = (0..8).map(|_| store(&client, "race")).collect();
    for store in &stores {
        assert_eq!(store.load().await.unwrap(), Stored::Nothing);
    }
    let names: Vec<_> = (0..8).map(|n| format!("root {n}")).collect();
    let writes = stores.iter().zip(&names);
    let written = join_all(writes.map(|(s, name)| s.replace(name.as_bytes()))).await;
    let won: Vec<_> = (0..8).filter(|n| written[*n].is_ok()).collect();
    let [won] = won[..] else {
        panic!("{written:?}");
    };
    assert_eq!(load(&client, "race").await.1, names[won].as_bytes());
}

/// Two writers at the same time: the next one finds the last state that was confirmed, and the earlier one stops.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_replaced_writer_is_kept() {
    let Some((_cluster, client)) = cluster("nothing_of_a_replaced_writer_is_kept").await else {
        return;
    };
    let begin = store(&client, "fence");
    begin.load().await.unwrap();
    begin.replace(b"0").await.unwrap();
    let mut number = 0;
    for _ in 0..4 {
        let (old, _) = load(&client, "fence").await;
        let (sender, mut confirmed) = watch::channel(number);
        let some_writes = number + 3;
        let old_writes = async {
            let confirms = sender;
            loop {
                number += 1;
                if let Err(error) = old.replace(number.to_string().as_bytes()).await {
                    return (*confirms.borrow(), error.0);
                }
                confirms.send_replace(number);
                // The new writer needs a moment without another write.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let new_loads = async {
            // Fails if the old writer has.
            let _ = confirmed.wait_for(|last| *last >= some_writes).await;
            load(&client, "fence").await
        };
        let ((confirmed, why), (_new, state)) = tokio::join!(old_writes, new_loads);
        assert!(why.contains("another CA is active"), "{why}");
        assert_eq!(state, confirmed.to_string().as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_damaged_foreign_deleted_and_large_states() {
    let test = "refuses_damaged_foreign_deleted_and_large_states";
    let Some((cluster, client)) = cluster(test).await else {
        return;
    };
    let begin = store(&client, "broken");
    begin.load().await.unwrap();
    begin.replace(b"state").await.unwrap();
    let refused = async |name: &str, what: &str| {
        let error = store(&client, name).load().await.unwrap_err().0;
        assert!(error.contains(what), "{error}");
    };
    let set = |format: &str| {
        let change = json!({"data": {"format": format}});
        cluster.merge(&path("broken"), &change).unwrap();
    };
    set("OTk=");
    let expected = format!("Secret {NAMESPACE}/broken: is damaged, or of another version");
    refused("broken", &expected).await;
    // The format of earlier versions is read; the document inside says what it is.
    set("MQ==");
    assert_eq!(load(&client, "broken").await.1, b"state");
    let foreign = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "foreign"}, "stringData": {"core": "x"},
    });
    let secrets = format!("/api/v1/namespaces/{NAMESPACE}/secrets");
    cluster.create(&secrets, &foreign).unwrap();
    refused("foreign", "is not the state of this CA").await;
    // Deleted while a leader uses it.
    let begin = store(&client, "gone");
    begin.load().await.unwrap();
    begin.replace(b"state").await.unwrap();
    cluster.delete(&path("gone")).unwrap();
    begin.replace(b"state").await.unwrap_err();
    assert!(*begin.lost().borrow());
    // Larger than a Secret.
    let begin = store(&client, "large");
    begin.load().await.unwrap();
    begin.replace(&vec![7; 900 << 10]).await.unwrap();
    let error = begin.replace(&vec![7; 1 << 20]).await.unwrap_err().0;
    assert!(error.contains("1048576 bytes of at most"), "{error}");
    assert_eq!(load(&client, "large").await.1.len(), 900 << 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn late_and_lost_answers_are_not_conflicts() {
    let test = "late_and_lost_answers_are_not_conflicts";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return;
    }
    let cluster = Kubernetes::start().unwrap();
    let client = as_ca(&cluster).await;
    let first = store(&client, "late");
    first.load().await.unwrap();
    first.replace(b"one").await.unwrap();
    // The API server stops answering with the request on its way, and handles it when nobody waits any more.
    cluster.freeze(true).unwrap();
    let error = first.replace(b"two").await.unwrap_err().0;
    let timed_out = error.contains("the API server") || error.contains("not done within");
    assert!(timed_out, "{error}");
    cluster.freeze(false).unwrap();
    first.replace(b"three").await.unwrap();
    assert!(!*first.lost().borrow());
    cluster.stop_server().unwrap();
    let error = first.replace(b"four").await.unwrap_err().0;
    assert!(
        error.contains("the API server cannot be reached"),
        "{error}"
    );
    cluster.start_server().unwrap();
    first.replace(b"five").await.unwrap();
    assert_eq!(load(&client, "late").await.1, b"five");
}
