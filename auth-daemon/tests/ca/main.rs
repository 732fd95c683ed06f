//! The CA over real TLS and gRPC: what it issues to whom, what it refuses, and what a daemon learns from it.

mod audit;
mod daemon;
mod harness;
mod joining;
mod jwt;
mod program;
mod quotas;

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use auth_ca::authority::Target;
use auth_ca_api::auth::WatchRequest;
use auth_tunnel::tls::{svid::Svid, trust::Reason};
use harness::*;
use rcgen::{BasicConstraints, IsCa, KeyUsagePurpose};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tonic::{Code, Request, transport::Channel};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_certificates_of_its_pods_whatever_usage_the_csr_asks_for() {
    let ca = Ca::start().await;
    let (_, csr) = csr(|params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    });
    let chain = Ask::but(|ask| ask.csr = csr)
        .send(&ca.caller().await)
        .await
        .unwrap();
    assert_eq!(chain.last(), ca.roots().first(), "the root comes last");
    let svid = Svid::parse(&chain[0], &domain()).unwrap();
    assert_eq!(svid.identity, identity("web"));
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1, "{names:?}");
    let life = svid
        .not_after
        .duration_since(std::time::SystemTime::now())
        .unwrap();
    assert!(
        life <= Duration::from_secs(3600) && life > Duration::from_secs(3500),
        "{life:?}"
    );
    assert_eq!(svid.node.as_deref(), Some("a"), "in the extension");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_its_identity_by_token_and_renews_by_certificate() {
    let ca = Ca::start().await;
    let own = ca.issuer.token("web", "a", |_| {});
    let (key, csr) = csr(|_| {});
    let first = Ask {
        csr,
        seconds: 0,
        ..Ask::for_itself(Some(own))
    };
    let mut chain = first.send(&ca.caller().await).await.unwrap();
    chain.pop();
    let certified = || Some((chain.clone(), private_key(&key)));
    let holder = connect(ca.address, ca.roots(), certified()).await.unwrap();
    let renewed = Ask::for_itself(None).send(&holder).await.unwrap();
    assert_eq!(
        Svid::parse(&renewed[0], &domain()).unwrap().identity,
        identity("web")
    );
    let another = Ask {
        identity: Some(identity("api").to_string()),
        ..Ask::for_itself(None)
    };
    let refused = another.send(&holder).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    let bad_token = Ask::for_itself(Some("z".repeat(40)));
    let refused = bad_token.send(&holder).await;
    assert_eq!(
        refused.unwrap_err().code(),
        Code::Unauthenticated,
        "a bad token is not made good"
    );

    let serial = Svid::parse(&chain[0], &domain()).unwrap().serial;
    ca.authority
        .revoke(
            Target::Serial(serial.parse().unwrap()),
            Reason::KeyCompromise,
        )
        .await
        .unwrap();
    let refused = Ask::for_itself(None).send(&holder).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("keyCompromise"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_acts_as_an_account_by_token_alone_and_as_a_client_only() {
    let ca = Ca::start().await;
    // No pod of the account runs.
    ca.run_pods([]);
    let (key, csr) = csr(|_| {});
    let alice = |account: &str| Ask {
        csr: csr.clone(),
        bearer: Some(ca.issuer.person("alice@example.com")),
        identity: Some(identity(account).to_string()),
        seconds: 24 * 3600,
    };
    let caller = ca.caller().await;
    let mut chain = alice("web").send(&caller).await.unwrap();
    let roots = vec![chain.pop().unwrap()];
    let svid = Svid::parse(&chain[0], &domain()).unwrap();
    assert_eq!(svid.identity, identity("web"));
    assert_eq!(svid.person.as_deref(), Some("oidc:alice@example.com"));
    assert_eq!(svid.node, None);
    let life = svid.not_after.duration_since(std::time::SystemTime::now());
    assert!(life.unwrap() <= Duration::from_secs(15 * 60), "{svid:?}");
    assert!(accepts(&roots, &chain), "as a client");
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth, "{usage:?}");

    let refused = alice("api").send(&caller).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("may not act as"), "{refused}");
    // Each renewal needs a token.
    let certified = Some((chain.clone(), private_key(&key)));
    let holder = connect(ca.address, ca.roots(), certified).await.unwrap();
    let refused = Ask::for_itself(None).send(&holder).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("use a token"), "{refused}");
}

/// A chain, and the roots that came with it.
type Received = (Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>);

/// Asks as Istio's clients do: the last element of the answer holds the roots, and the others are the chain.
async fn ask_as_istio(channel: &Channel) -> Received {
    let mut answer = Ask::good().send_plainly(channel).await.unwrap();
    let roots = answer.pop().unwrap();
    let read = |pem: &str| {
        let certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
        certificates.map(Result::unwrap).collect::<Vec<_>>()
    };
    (read(&answer.concat()), read(&roots))
}

fn accepts(roots: &[CertificateDer<'static>], chain: &[CertificateDer<'static>]) -> bool {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).unwrap();
    }
    let provider = Arc::new(auth_tunnel::tls::provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider)
        .build()
        .unwrap();
    let verified = verifier.verify_client_cert(&chain[0], &chain[1..], UnixTime::now());
    verified.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_istios_protocol_survives_a_root_rotation() {
    let ca = Ca::start().await;
    let channel = ca.caller().await;
    let old = ca.roots();
    let (before, before_roots) = ask_as_istio(&channel).await;
    assert_eq!(before_roots, old);
    ca.authority.rotate_root().await.unwrap();
    let (_, spreading_roots) = ask_as_istio(&channel).await;
    assert_eq!(spreading_roots.len(), 2);
    eventually("the new root signs", || {
        (ca.roots()[0] != old[0]).then_some(())
    })
    .await;
    let (after, after_roots) = ask_as_istio(&channel).await;
    assert_eq!(after_roots, ca.roots());
    assert!(accepts(&spreading_roots, &after), "it learned the new root");
    assert!(
        accepts(&after_roots, &before),
        "it still trusts the old one"
    );
    assert!(!accepts(&before_roots, &after), "the new root signs");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_issued_where_no_pod_of_the_identity_runs_any_more() {
    let ca = Ca::start().await;
    let by_token = |change: fn(&mut serde_json::Value)| {
        Ask::for_itself(Some(ca.issuer.token("web", "a", change)))
    };
    // Names neither a node nor a pod, so it proves no placement.
    let unbound =
        |claims: &mut serde_json::Value| claims["kubernetes.io"] = serde_json::Value::Null;
    let caller = ca.caller().await;
    let refused = by_token(unbound).send(&caller).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(
        refused.message().contains("neither a node nor a pod"),
        "{refused}"
    );

    let (key, csr) = csr(|_| {});
    let first = by_token(|_| {});
    let chain = Ask { csr, ..first }.send_plainly(&caller).await.unwrap();
    let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).unwrap();
    let certified = Some((vec![leaf], private_key(&key)));
    let holder = connect(ca.address, ca.roots(), certified).await.unwrap();
    Ask::for_itself(None).send(&holder).await.unwrap();

    ca.run_pods([pod("web", "b"), pod("api", "a")]);
    let left = Instant::now();
    for (what, ask, channel) in [
        ("its node's daemon", Ask::good(), &caller),
        ("its token", by_token(|_| {}), &caller),
        ("its certificate", Ask::for_itself(None), &holder),
    ] {
        let refused = ask.send(channel).await.expect_err(what);
        assert_eq!(refused.code(), Code::PermissionDenied, "{what}: {refused}");
        assert!(
            refused.message().contains("run on node a"),
            "{what}: {refused}"
        );
    }
    assert!(left.elapsed() < Duration::from_secs(60));
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_a_moment_for_a_pod_that_is_not_known_yet() {
    let ca = Ca::start().await;
    let caller = ca.caller().await;
    let asked = tokio::spawn(async move {
        Ask::but(|ask| ask.identity = Some(identity("new").to_string()))
            .send(&caller)
            .await
    });
    ca.until_asked("a").await;
    ca.run_pods([pod("new", "a")]);
    asked.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_refuses_requests() {
    let ca = Ca::start().await;
    let caller = ca.caller().await;
    let mut request = Request::new(WatchRequest {});
    let bearer = format!("bearer {}", token("a")).parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    let mut watch = watches(&caller).watch(request).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().roots.len(), 1);
    let authority = ca.lead.send_replace(None);
    assert_eq!(watch.message().await.unwrap_err().code(), Code::Unavailable);
    let refused = Ask::good().send(&caller).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("not the leader"), "{refused}");
    ca.lead.send_replace(authority);
    Ask::good().send(&caller).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_need_attestation_and_are_limited() {
    let ca = Ca::start().await;
    let caller = ca.caller().await;
    let refused = watches(&caller).watch(WatchRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let watch = || {
        let mut request = Request::new(WatchRequest {});
        let bearer = format!("Bearer {}", token("b")).parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
        let mut client = watches(&caller);
        async move { client.watch(request).await }
    };
    let mut held = Vec::new();
    let refused = loop {
        match watch().await {
            Ok(stream) => held.push(stream),
            Err(refused) => break refused,
        }
        assert!(held.len() < 100, "there is no limit");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    Ask::good().send(&caller).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_handshakes_time_out_and_block_nobody() {
    let ca = Ca::start().await;
    let start = Instant::now();
    let mut slow: Vec<_> = (0..100)
        .map(|_| {
            let mut stream = TcpStream::connect(ca.address).unwrap();
            stream.write_all(&[0x16, 3, 1]).unwrap();
            stream
        })
        .collect();
    Ask::good().send(&ca.caller().await).await.unwrap();
    let first = slow.remove(0);
    let ended = tokio::task::spawn_blocking(move || {
        let mut first = first;
        first
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut rest = Vec::new();
        // Closed or reset.
        let error = first.read_to_end(&mut rest).err();
        error.is_none_or(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
    });
    assert!(ended.await.unwrap(), "it is still open");
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn older_tls_is_refused() {
    let ca = Ca::start().await;
    let handshake = |version: &'static str| {
        let address = ca.address.to_string();
        tokio::task::spawn_blocking(move || {
            Command::new("openssl")
                .args(["s_client", version, "-alpn", "h2", "-connect", &address])
                .stdin(Stdio::null())
                .output()
                .unwrap()
                .status
                .success()
        })
    };
    assert!(handshake("-tls1_3").await.unwrap());
    assert!(!handshake("-tls1_2").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_answers_requests_in_progress() {
    let ca = Ca::start().await;
    let caller = ca.caller().await;
    // Waits for its pod while the CA stops.
    let asked = tokio::spawn(async move {
        Ask::but(|ask| ask.identity = Some(identity("ghost").to_string()))
            .send(&caller)
            .await
    });
    ca.until_asked("a").await;
    let socket = ca.config.operator_socket.clone();
    let (_folder, _, address) = ca.stop().await;
    let refused = asked.await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert!(
        TcpStream::connect(address).is_err(),
        "nobody listens any more"
    );
    assert!(!socket.exists());
}
