//! TokenReview.

use std::{fs, sync::Arc, time::SystemTime};

use auth_ca::attest::{
    Attestor, Caller, Credentials, Unattested,
    kubernetes::{Settings, TokenReviewer},
};
use auth_mesh::ObjectName;
use futures_util::future::join_all;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use mesh_tests::{Kubernetes, TokenOptions};
use serde_json::{Value, json};

use crate::{as_ca, cluster, eventually};

const AUDIENCE: &str = "auth-daemon-ca";

fn reviewer(client: kube::Client, namespace: &str) -> TokenReviewer {
    reviewer_for(client, namespace, false)
}

fn reviewer_for(client: kube::Client, namespace: &str, people: bool) -> TokenReviewer {
    TokenReviewer::new(
        client,
        Settings {
            trust_domain: "cluster.local".parse().unwrap(),
            audience: AUDIENCE.into(),
            node_service_account: Some(ObjectName {
                namespace: namespace.into(),
                name: "daemon".into(),
            }),
            people,
        },
    )
}

async fn attest(reviewer: &TokenReviewer, token: &str) -> Option<Result<Caller, Unattested>> {
    let credentials = Credentials {
        bearer: Some(token),
        certificate: None,
    };
    reviewer.attest(credentials).await
}

async fn refusal(reviewer: &TokenReviewer, token: &str) -> String {
    let error = attest(reviewer, token).await.unwrap().unwrap_err().0;
    for part in token.split('.') {
        assert!(!error.contains(part), "{error}");
    }
    error
}

fn token(cluster: &Kubernetes, namespace: &str, account: &str, pod: &Value) -> String {
    let options = TokenOptions {
        audience: Some(AUDIENCE),
        pod: Some(pod),
        seconds: None,
    };
    cluster.token(namespace, account, &options).unwrap()
}

/// The ID in a token (RFC 7519 §4.1.7).
fn token_id(token: &str) -> String {
    let claims: Value = jsonwebtoken::dangerous::insecure_decode_claims(token).unwrap();
    claims["jti"].as_str().unwrap().to_owned()
}

/// A token that the API server itself might have made.
fn forged(cluster: &Kubernetes, claims: &Value) -> String {
    let key = fs::read(cluster.accounts_key()).unwrap();
    let key = EncodingKey::from_ec_pem(&key).unwrap();
    jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &key).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_review_says_who_calls_from_which_node() {
    let test = "the_review_says_who_calls_from_which_node";
    let Some((cluster, client)) = cluster(test).await else {
        return;
    };
    cluster.namespace("callers").unwrap();
    let make = |name: &str, account: &str, node: &str| {
        let address = format!("10.1.0.{}", name.len());
        cluster
            .pod("callers", name, account, node, &address)
            .unwrap()
    };
    for account in ["daemon", "web"] {
        cluster.service_account("callers", account).unwrap();
    }
    let daemon_a = make("daemon-a", "daemon", "node-a");
    let daemon_b = make("daemon-on-b", "daemon", "node-b");
    let web = make("web", "web", "node-a");
    let reviewer = reviewer(client.clone(), "callers");

    let caller = |pod: &Value, account: &str| {
        let token = token(&cluster, "callers", account, pod);
        let reviewer = &reviewer;
        async move { attest(reviewer, &token).await.unwrap().unwrap() }
    };
    let node = |name: &str| Caller::Node { node: name.into() };
    assert_eq!(caller(&daemon_a, "daemon").await, node("node-a"));
    assert_eq!(caller(&daemon_b, "daemon").await, node("node-b"));
    let workload = Caller::Workload {
        identity: "spiffe://cluster.local/ns/callers/sa/web".parse().unwrap(),
        node: "node-a".into(),
    };
    assert_eq!(caller(&web, "web").await, workload);

    // For somebody else.
    let options = TokenOptions {
        audience: Some("vault"),
        pod: Some(&web),
        seconds: None,
    };
    let other = cluster.token("callers", "web", &options).unwrap();
    let error = refusal(&reviewer, &other).await;
    assert!(error.contains("for audience \"auth-daemon-ca\""), "{error}");
    // Not bound to a pod: nobody knows where it is.
    let options = TokenOptions {
        pod: None,
        audience: Some(AUDIENCE),
        seconds: None,
    };
    let unbound = cluster.token("callers", "daemon", &options).unwrap();
    let error = refusal(&reviewer, &unbound).await;
    assert!(error.contains("bound to no pod"), "{error}");
    // Unless people may act as accounts; nobody may act as a node.
    let for_people = reviewer_for(client, "callers", true);
    let error = refusal(&for_people, &unbound).await;
    assert!(
        error.contains("nobody may act as callers/daemon"),
        "{error}"
    );
    let own = cluster.token("callers", "web", &options).unwrap();
    let web_account = "spiffe://cluster.local/ns/callers/sa/web";
    match attest(&for_people, &own).await.unwrap().unwrap() {
        Caller::Person {
            person,
            identities,
            counts_for,
        } => {
            // The ID of the token, as in the API server's audit log.
            assert_eq!(person, format!("kubernetes-token:{}", token_id(&own)));
            assert_eq!(identities, [web_account.parse().unwrap()]);
            assert_eq!(counts_for, web_account);
        }
        caller => panic!("{caller}"),
    }
    // Not signed by the API server.
    let good = token(&cluster, "callers", "web", &web);
    let (unsigned, signature) = good.rsplit_once('.').unwrap();
    let broken: String = signature.chars().rev().collect();
    let error = refusal(&reviewer, &format!("{unsigned}.{broken}")).await;
    assert!(error.contains("does not accept the token"), "{error}");
    // Nothing that this attestor knows.
    assert_eq!(attest(&reviewer, "a-static-token").await, None);
    // Its claims are {}.
    let error = refusal(&reviewer, "header.e30.signature").await;
    assert!(error.contains("never expires"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rejects_expired_token_and_token_of_deleted_pod() {
    let test = "rejects_expired_token_and_token_of_deleted_pod";
    let Some((cluster, client)) = cluster(test).await else {
        return;
    };
    cluster.namespace("endings").unwrap();
    let account = cluster.service_account("endings", "web").unwrap();
    let pod = cluster
        .pod("endings", "web", "web", "node-a", "10.1.1.1")
        .unwrap();
    let reviewer = reviewer(client, "endings");
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let claims = |pod_uid: &Value, from: u64, to: u64| {
        json!({
            "iss": "https://kubernetes.default.svc", "aud": [AUDIENCE], "iat": from, "nbf": from, "exp": to,
            "sub": "system:serviceaccount:endings:web",
            "kubernetes.io": {
                "namespace": "endings",
                "serviceaccount": {"name": "web", "uid": account["metadata"]["uid"]},
                "pod": {"name": "web", "uid": pod_uid},
            },
        })
    };
    let uid = &pod["metadata"]["uid"];
    // The forgery is good: what is refused below is refused for the one thing that is wrong with it.
    let like_the_real_one = forged(&cluster, &claims(uid, now - 100, now + 100));
    assert!(attest(&reviewer, &like_the_real_one).await.unwrap().is_ok());
    let expired = forged(&cluster, &claims(uid, now - 100, now - 50));
    assert_eq!(refusal(&reviewer, &expired).await, "the token has expired");
    let of_another_pod = forged(&cluster, &claims(&json!("other"), now - 100, now + 100));
    let error = refusal(&reviewer, &of_another_pod).await;
    assert!(error.contains("does not accept the token"), "{error}");
    let mut endless = claims(uid, now - 100, 0);
    endless.as_object_mut().unwrap().remove("exp");
    let error = refusal(&reviewer, &forged(&cluster, &endless)).await;
    assert!(error.contains("never expires"), "{error}");

    let fresh = || token(&cluster, "endings", "web", &pod);
    let before = fresh();
    assert!(attest(&reviewer, &before).await.unwrap().is_ok());
    // The pod is being deleted, and its kubelet has not confirmed yet. Its token names the node, and the API server
    // accepts it (Kubernetes 1.30).
    let path = "/api/v1/namespaces/endings/pods/web";
    let unseen = fresh();
    cluster.delete(path).unwrap();
    assert!(attest(&reviewer, &unseen).await.unwrap().is_ok());
    // The CA looks up the pod of a token that does not name the node.
    let unseen = forged(&cluster, &claims(uid, now - 98, now + 98));
    let error = refusal(&reviewer, &unseen).await;
    assert!(
        error.contains("pod endings/web is being deleted"),
        "{error}"
    );
    cluster
        .delete(&format!("{path}?gracePeriodSeconds=0"))
        .unwrap();
    // What reviews tokens in the API server learns of it a moment later. Until then, the CA itself sees that it is gone.
    let mut later = now;
    eventually("the end of the pod's tokens", async || {
        later += 1;
        let unseen = forged(&cluster, &claims(uid, now - 99, later + 99));
        let error = refusal(&reviewer, &unseen).await;
        error.contains("does not accept the token").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_at_once_are_a_handful_of_reviews() {
    let test = "thousands_at_once_are_a_handful_of_reviews";
    let Some((cluster, client)) = cluster(test).await else {
        return;
    };
    cluster.namespace("crowd").unwrap();
    cluster.service_account("crowd", "daemon").unwrap();
    let pods: Vec<_> = (1..=5)
        .map(|n| {
            let (name, node) = (format!("daemon-{n}"), format!("node-{n}"));
            cluster
                .pod("crowd", &name, "daemon", &node, &format!("10.1.2.{n}"))
                .unwrap()
        })
        .collect();
    let tokens: Vec<_> = pods
        .iter()
        .map(|pod| token(&cluster, "crowd", "daemon", pod))
        .collect();
    let reviewer = Arc::new(reviewer(client, "crowd"));
    let reviews = || {
        let page = cluster.text("/metrics").unwrap();
        let of_reviews = page.lines().filter(|line| {
            line.starts_with("apiserver_request_total{")
                && line.contains("resource=\"tokenreviews\"")
        });
        let counts =
            of_reviews.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap());
        counts.sum::<f64>()
    };
    let others_may_review_meanwhile = 20.0;
    let before = reviews();
    let asked = (0..5000).map(|n| {
        let (reviewer, token) = (reviewer.clone(), tokens[n % tokens.len()].clone());
        tokio::spawn(async move { attest(&reviewer, &token).await.unwrap() })
    });
    for (n, outcome) in join_all(asked).await.into_iter().enumerate() {
        let node = format!("node-{}", n % tokens.len() + 1);
        assert_eq!(outcome.unwrap().unwrap(), Caller::Node { node });
    }
    let made = reviews() - before;
    assert!(
        made >= 5.0 && made < 5.0 + others_may_review_meanwhile,
        "{made}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_review_means_no_admission() {
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED no_review_means_no_admission: {why}");
        return;
    }
    let cluster = Kubernetes::start().unwrap();
    let client = as_ca(&cluster).await;
    cluster.service_account("default", "daemon").unwrap();
    let pod = cluster
        .pod("default", "d", "daemon", "node-a", "10.1.3.1")
        .unwrap();
    let reviewer = reviewer(client, "default");
    let fresh = || token(&cluster, "default", "daemon", &pod);
    let (known, unknown, later) = (
        fresh(),
        fresh_after_a_second(&fresh),
        fresh_after_a_second(&fresh),
    );
    assert!(attest(&reviewer, &known).await.unwrap().is_ok());
    // Frozen, it takes connections and says nothing.
    cluster.freeze(true).unwrap();
    let error = refusal(&reviewer, &unknown).await;
    assert!(error.contains("within 5s"), "{error}");
    cluster.freeze(false).unwrap();
    cluster.stop_server().unwrap();
    let error = refusal(&reviewer, &later).await;
    assert!(error.contains("cannot be reached"), "{error}");
    cluster.start_server().unwrap();
    assert!(attest(&reviewer, &later).await.unwrap().is_ok());
    // The role is taken away: refused, with what the API server says.
    cluster
        .delete("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/auth-ca")
        .unwrap();
    let error = eventually("the end of the CA's rights", async || {
        let token = fresh_after_a_second(&fresh);
        attest(&reviewer, &token).await.unwrap().err()
    })
    .await;
    assert!(
        error.0.contains("tokenreviews") && error.0.contains("Forbidden"),
        "{error}"
    );
}

/// Tokens that are made in the same second are the same.
fn fresh_after_a_second(fresh: &impl Fn() -> String) -> String {
    let first = fresh();
    loop {
        let next = fresh();
        if next != first {
            return next;
        }
    }
}
