//! The audit log of the program: who got what, what was refused and why, and what the operator did.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use auth_tunnel::tls::{rfc3339, svid::Svid, unix_seconds};
use futures_util::future::join_all;
use rcgen::{CertificateParams, KeyUsagePurpose, SanType};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject};
use serde_json::{Value, json};
use tonic::{Code, Status, transport::Channel};

use crate::{
    harness::*,
    program::{self, Running},
};

/// One pod on each node.
const PODS: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: default, uid: uid-of-web-1}
spec: {nodeName: a, serviceAccountName: web, containers: []}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: api-1, namespace: default, uid: uid-of-api-1}
spec: {nodeName: b, serviceAccountName: api, containers: []}
status: {phase: Running, podIP: 10.0.0.2}
";

/// The program, and its log in JSON.
struct Audited {
    folder: tempfile::TempDir,
    config: PathBuf,
    address: SocketAddr,
    issuer: Issuer,
    lines: mpsc::Receiver<String>,
    _ca: Running,
}

impl Audited {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let issuer = Issuer::new();
        let more = format!("{}log: {{format: json}}\n", issuer.trusted(folder.path()));
        let config = write_config(folder.path(), "127.0.0.1:0", &more);
        fs::write(folder.path().join("manifests/pods.yaml"), PODS).unwrap();
        let (ca, started, lines) = program::start_logged(&config);
        let started: Value = serde_json::from_str(&started).unwrap();
        Self {
            config,
            address: started["address"].as_str().unwrap().parse().unwrap(),
            folder,
            issuer,
            lines,
            _ca: ca,
        }
    }

    fn roots(&self) -> Vec<CertificateDer<'static>> {
        let roots = self.folder.path().join("state/root-cert.pem");
        let roots = CertificateDer::pem_file_iter(roots).unwrap();
        roots.map(Result::unwrap).collect()
    }

    async fn caller(&self) -> Channel {
        connect(self.address, self.roots(), None).await.unwrap()
    }

    /// The next line of the audit log with this event.
    fn next(&self, event: &str) -> Value {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(30));
            let line = line.unwrap_or_else(|_| panic!("no line about {event}"));
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["target"] == "audit" && line["event"] == event {
                return line;
            }
        }
    }
}

/// The fields of `line` that are listed in `expected` are equal.
#[track_caller]
fn assert_fields(line: &Value, expected: Value) {
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&line[name], value, "{name} in {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn issuances_say_who_got_what() {
    let ca = Audited::start();
    let caller = ca.caller().await;
    let (key, csr) = csr(|_| {});
    let secret = csr.lines().nth(1).unwrap().to_owned();
    let by_token = |csr: String| Ask {
        csr,
        ..Ask::for_itself(Some(ca.issuer.token("web", "a", |_| {})))
    };
    let web = identity("web");
    let workload = format!("{web} on node a");
    let check = |line: &Value, leaf: &CertificateDer<'_>, caller: &str| {
        let leaf = Svid::parse(leaf, &domain()).unwrap();
        let peer: SocketAddr = line["peer"].as_str().unwrap().parse().unwrap();
        assert!(peer.ip().is_loopback() && peer.port() != 0, "{line}");
        assert_fields(
            line,
            json!({
                "caller": caller, "node": "a", "pods": "default/web-1", "identity": web.as_str(),
                "serial": &*leaf.serial, "not_after": rfc3339(unix_seconds(leaf.not_after)),
            }),
        );
    };
    let chain = Ask::good().send(&caller).await.unwrap();
    check(&ca.next("issued"), &chain[0], "node a");
    let chain = by_token(csr).send(&caller).await.unwrap();
    let line = ca.next("issued");
    check(&line, &chain[0], &workload);
    let text = line.to_string();
    assert!(!text.contains(&secret) && !text.contains("eyJ"), "{text}");
    let certified = (chain[..1].to_vec(), private_key(&key));
    let holder = connect(ca.address, ca.roots(), Some(certified)).await;
    let renewal = Ask::for_itself(None);
    let chain = renewal.send(&holder.unwrap()).await.unwrap();
    check(&ca.next("issued"), &chain[0], &workload);
    let jwt = crate::jwt::ask(&caller, Some(token("a")), web.as_str(), &["db", "queue"]);
    let jwt = jwt.await.unwrap();
    let line = ca.next("jwtIssued");
    assert_fields(
        &line,
        json!({
            "caller": "node a", "node": "a", "pods": "default/web-1", "identity": web.as_str(),
            "audience": r#"["db", "queue"]"#,
        }),
    );
    assert!(!line.to_string().contains(&jwt), "{line}");
}

const NODE_A: &str = "node a";
const WEB: &str = "spiffe://cluster.local/ns/default/sa/web on node a";

/// What is wrong with a request, the caller in the audit log, the request, and why it is refused.
type Case = (&'static str, &'static str, Ask, &'static str);

/// Requests whose caller is not accepted.
fn unattested(issuer: &Issuer) -> Vec<Case> {
    let now = jsonwebtoken::get_current_timestamp();
    let with = |bearer: String| Ask::for_itself(Some(bearer));
    let jwt =
        |change: fn(&mut Value, u64)| with(issuer.token("web", "a", |claims| change(claims, now)));
    let of_pod = |name: &str, uid: &str| {
        with(issuer.token("web", "a", |claims| {
            claims["kubernetes.io"]["pod"] = json!({"name": name, "uid": uid});
        }))
    };
    let none = Ask::but(|ask| ask.bearer = None);
    let forged = with(Issuer::new().token("web", "a", |_| {}));
    let early = jwt(|claims, now| claims["nbf"] = (now + 360).into());
    let for_ever = jwt(|claims, _| drop(claims.as_object_mut().unwrap().remove("exp")));
    let audience = jwt(|claims, _| claims["aud"] = "x".into());
    let unbound = jwt(|claims, _| claims["kubernetes.io"] = Value::Null);
    let late = jwt(|claims, now| claims["exp"] = (now - 360).into());
    vec![
        ("no token", "", none, "neither a bearer token"),
        ("unknown", "", with("y".repeat(40)), "no known node's"),
        ("long", "", with("y".repeat(13 << 10)), "too long"),
        ("forged", "", forged, "signature"),
        ("expired", "", late, "expired"),
        ("from the future", "", early, "not valid yet"),
        ("forever", "", for_ever, "has no exp"),
        ("audience", "", audience, "another audience"),
        ("unbound", "", unbound, "neither a node nor a pod"),
        ("replaced pod", "", of_pod("web-1", "older"), "replaced"),
        ("deleted pod", "", of_pod("web-0", "older"), "deleted"),
    ]
}

/// Requests for what the caller must not have.
fn denied(issuer: &Issuer) -> Vec<Case> {
    let asks = |identity: &str| Ask::but(|ask| ask.identity = Some(identity.to_owned()));
    let (web, api, ghost) = (identity("web"), identity("api"), identity("ghost"));
    let foreign = "spiffe://example.org/ns/default/sa/web";
    let token_of = |node: &str| issuer.token("web", node, |_| {});
    let other_node = Ask::but(|ask| ask.bearer = Some(token("b")));
    let for_another = Ask {
        bearer: Some(token_of("a")),
        ..asks(api.as_str())
    };
    let gone = Ask::for_itself(Some(token_of("b")));
    let on_b = "spiffe://cluster.local/ns/default/sa/web on node b";
    assert!(on_b.starts_with(web.as_str()));
    vec![
        ("another node", "node b", other_node, "run on node b"),
        ("nowhere", NODE_A, asks(ghost.as_str()), "run on node a"),
        ("foreign", NODE_A, asks(foreign), "another trust domain"),
        ("another", WEB, for_another, "its own identity only"),
        ("gone", on_b, gone, "run on node b"),
    ]
}

/// Requests that are wrong whoever sends them.
fn malformed() -> Vec<Case> {
    let with = |csr: String| Ask::but(|ask| ask.csr = csr);
    let named = |name: SanType| with(csr(|params| params.subject_alt_names = vec![name]).1);
    let admin = "spiffe://cluster.local/ns/kube-system/sa/admin";
    let bad_signature = {
        let (_, csr) = csr(|_| {});
        let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).unwrap();
        let mut der = der.to_vec();
        *der.last_mut().unwrap() ^= 1;
        auth_ca_api::pem::encode("CERTIFICATE REQUEST", &der)
    };
    let p224 = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-224"];
    let unnamed = Ask::but(|ask| ask.identity = None);
    let no_identity = Ask::but(|ask| ask.identity = Some("web".into()));
    let another = named(SanType::URI(admin.try_into().unwrap()));
    let extra = named(SanType::DnsName("evil.example".try_into().unwrap()));
    let rsa = with(openssl_csr(&["-newkey", "rsa:1024"]));
    vec![
        ("unnamed", NODE_A, unnamed, "ImpersonatedIdentity"),
        ("no identity", NODE_A, no_identity, "spiffe://"),
        ("no CSR", NODE_A, with("x".into()), "CERTIFICATE REQUEST"),
        ("bad signature", NODE_A, with(bad_signature), "sign"),
        ("another name", NODE_A, another, admin),
        ("another kind of name", NODE_A, extra, "evil.example"),
        ("RSA-1024", NODE_A, rsa, "1024"),
        ("P-224", NODE_A, with(openssl_csr(&p224)), "P-224"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_explain_what_is_wrong_and_are_audited() {
    let ca = Audited::start();
    let caller = ca.caller().await;
    let large = Ask::but(|ask| ask.csr = ask.csr.repeat(10 << 20 >> 8));
    let large = vec![("10 MB", "", large, "larger")];
    for (code, kind, cases) in [
        (Code::Unauthenticated, "unattested", unattested(&ca.issuer)),
        (Code::PermissionDenied, "denied", denied(&ca.issuer)),
        (Code::InvalidArgument, "malformed", malformed()),
        (Code::ResourceExhausted, "tooLarge", large),
    ] {
        for (what, by, ask, why) in cases {
            let asked = ask.identity.clone().unwrap_or_default();
            let refused = ask.send(&caller).await.expect_err(what);
            assert_eq!(refused.code(), code, "{what}: {refused}");
            assert!(refused.message().contains(why), "{what}: {refused}");
            let line = ca.next("refused");
            let node = by.rsplit("node ").next().unwrap();
            assert_fields(&line, json!({"kind": kind, "caller": by, "node": node}));
            assert_eq!(line["why"], refused.message(), "{what}");
            if !by.is_empty() {
                assert_eq!(line["asked"], asked, "{what}");
            }
        }
    }
    Ask::good()
        .send(&caller)
        .await
        .expect("the connection is as good as before");
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_with_bad_certificates_are_audited() {
    let ca = Audited::start();
    let (key, csr) = csr(|_| {});
    let chain = Ask::but(|ask| ask.csr = csr).send(&ca.caller().await).await;
    let chain = chain.unwrap();
    let large: Vec<_> = chain.iter().cycle().take(10).cloned().collect();
    let mut stranger = CertificateParams::default();
    stranger.subject_alt_names = vec![SanType::URI(identity("web").as_str().try_into().unwrap())];
    stranger.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let stranger = stranger.self_signed(&key).unwrap();
    for (what, certificates, why) in [
        ("a large chain", large, "too large"),
        ("a stranger", vec![stranger.der().clone()], "certificate"),
    ] {
        let certified = Some((certificates, private_key(&key)));
        // In TLS 1.3 the client finishes first, so only the first request fails.
        if let Ok(channel) = connect(ca.address, ca.roots(), certified).await {
            Ask::good().send(&channel).await.expect_err(what);
        }
        // A client that is refused before it has sent its request connects again, and is refused again.
        let mut lines = std::iter::repeat_with(|| ca.next("refused"));
        let line = lines.find(|line| line["why"].as_str().unwrap().contains(why));
        assert_fields(
            &line.unwrap(),
            json!({"kind": "handshake", "caller": "", "node": ""}),
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_for_quotas_are_audited() {
    let ca = Audited::start();
    let caller = ca.caller().await;
    // Together, because the quota fills up again meanwhile.
    let asked = join_all((0..64).map(|_| Ask::good().send(&caller))).await;
    let refused: Vec<_> = asked.into_iter().filter_map(Result::err).collect();
    assert!(!refused.is_empty(), "there is no quota");
    for status in &refused {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    }
    let line = ca.next("refused");
    assert_fields(
        &line,
        json!({"kind": "overQuota", "caller": NODE_A, "node": "a"}),
    );
    let mut messages = refused.iter().map(Status::message);
    assert!(messages.any(|message| line["why"] == message), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_the_operator_are_audited() {
    let ca = Audited::start();
    let caller = ca.caller().await;
    let uid = nix::unistd::getuid().as_raw();
    let operate = |arguments: &[&str], config: &Path| program::answer(arguments, config);
    let web = identity("web");
    for (option, name, target) in [
        ("--identity", web.as_str(), web.as_str()),
        ("--node", "a", "node a"),
    ] {
        let revoke = ["revoke", option, name, "--reason", "keyCompromise"];
        operate(&revoke, &ca.config);
        let done = json!({"target_name": target, "detail": "keyCompromise", "uid": uid});
        assert_fields(&ca.next("revoked"), done);
        let refused = Ask::good().send(&caller).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        let line = ca.next("refused");
        assert_fields(
            &line,
            json!({"kind": "revoked", "caller": NODE_A, "asked": web.as_str()}),
        );
        operate(&["unrevoke", option, name], &ca.config);
        Ask::good().send(&caller).await.unwrap();
        let done = json!({"target_name": target, "detail": "", "uid": uid});
        assert_fields(&ca.next("unrevoked"), done);
    }
    let serial = "5d0f3fc6992a09d3f3efcde14a73fe93";
    operate(&["revoke", "--serial", serial], &ca.config);
    let target = format!("certificate {serial}");
    assert_fields(&ca.next("revoked"), json!({"target_name": target}));
    let phase = operate(&["rotate-root"], &ca.config);
    assert_fields(
        &ca.next("rootRotation"),
        json!({"detail": phase.trim(), "uid": uid}),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn says_who_created_a_join_token_and_which_machine_used_it() {
    let ca = Audited::start();
    let create = |node: &str| program::answer(&["token", "create", "--node", node], &ca.config);
    let token = create("vm-1").trim().to_owned();
    let created = ca.next("joinTokenCreated");
    assert_eq!(created["node"], "vm-1");
    assert_eq!(created["uid"], nix::unistd::geteuid().as_raw());
    let caller = ca.caller().await;
    let ask = || Ask::for_itself(Some(token.clone())).send(&caller);
    ask().await.unwrap();
    assert_eq!(ca.next("nodeJoined")["node"], "vm-1");
    ask().await.unwrap_err();
    let refused = ca.next("refused");
    assert_eq!(refused["kind"], "unattested");
    assert!(!refused.to_string().contains(&token), "{refused}");
    create("vm-2");
    program::answer(&["token", "delete", "--node", "vm-2"], &ca.config);
    assert_eq!(ca.next("joinTokenDeleted")["node"], "vm-2");
}
