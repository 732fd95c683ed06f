//! Machines outside Kubernetes that join by a one-time token: what a token and a node's own certificate are good for.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf, sync::Arc, time::Duration};

use auth_ca::{authority::Target, quotas::Limits};
use auth_ca_api::auth::WatchRequest;
use auth_daemon::{
    config::{CaServer, Join, Proof},
    issuer::{CaClient, IssueError, Issuer as _},
};
use auth_tunnel::tls::{
    Verifier, explain, provider,
    svid::{NodeCertificate, Svid},
    trust::{ForeignBundles, Reason, Trust, TrustBundle, TrustStore},
};
use futures_util::future::join_all;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::{
    client::danger::ServerCertVerifier as _,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    server::danger::ClientCertVerifier as _,
};
use tonic::{Code, Request, Status, transport::Channel};

use crate::harness::*;

/// A CA on whose node vm-1 a pod of `db` runs, besides those of [`Ca::start`].
async fn start() -> Ca {
    let ca = Ca::start().await;
    ca.run_pods([pod("web", "a"), pod("api", "b"), pod("db", "vm-1")]);
    ca
}

async fn new_token(ca: &Ca, node: &str, replace: bool) -> Result<String, String> {
    let authority = &ca.authority;
    let created = authority.create_join_token(node, Duration::ZERO, replace, Some(0));
    created.await.map_err(|refusal| refusal.to_string())
}

fn csr_of(key: &KeyPair, node: &str) -> String {
    let mut params = CertificateParams::default();
    let uri = NodeCertificate::uri(node, &domain());
    params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
    params.serialize_request(key).unwrap().pem().unwrap()
}

/// Uses a token as `node` with `key`. Returns the chain without the root.
async fn join(
    caller: &Channel,
    token: &str,
    key: &KeyPair,
    node: &str,
) -> Result<Vec<CertificateDer<'static>>, Status> {
    let ask = Ask {
        csr: csr_of(key, node),
        ..Ask::for_itself(Some(token.to_owned()))
    };
    let mut chain = ask.send(caller).await?;
    chain.pop();
    Ok(chain)
}

async fn connect_as(ca: &Ca, chain: &[CertificateDer<'static>], key: &KeyPair) -> Channel {
    let certified = Some((chain.to_vec(), private_key(key)));
    connect(ca.address, ca.roots(), certified).await.unwrap()
}

/// Asks for the identity of `account` with the certificate of the connection.
async fn ask_for(channel: &Channel, account: &str) -> Result<Vec<CertificateDer<'static>>, Status> {
    let ask = Ask::but(|ask| {
        ask.bearer = None;
        ask.identity = Some(identity(account).to_string());
    });
    ask.send(channel).await
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, expected: &str) {
    let refused = answer.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    assert!(refused.message().contains(expected), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_joins_once_and_then_has_its_own_certificate() {
    let ca = start().await;
    let caller = ca.caller().await;
    let (key, thief) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let token = new_token(&ca, "vm-1", false).await.unwrap();

    // The token is good for nothing else, and for no other name.
    let mut watch = Request::new(WatchRequest {});
    let bearer = format!("Bearer {token}").parse().unwrap();
    watch.metadata_mut().insert("authorization", bearer);
    refused(watches(&caller).watch(watch).await, "join token");
    refused(
        join(&caller, &token, &key, "vm-2").await,
        "asks for the name",
    );
    refused(
        join(&caller, "auth-daemon-join-x", &key, "vm-1").await,
        "unknown",
    );
    // A wrong token is a failed attestation, whatever else is wrong.
    let rubbish = Ask {
        csr: "rubbish".into(),
        ..Ask::for_itself(Some("auth-daemon-join-x".into()))
    };
    refused(rubbish.send(&caller).await, "unknown");

    let chain = join(&caller, &token, &key, "vm-1").await.unwrap();
    let first = NodeCertificate::parse(&chain[0], &domain()).unwrap();
    assert_eq!(first.node, "vm-1");
    refused(
        join(&caller, &token, &thief, "vm-1").await,
        "with another key",
    );

    let own = connect_as(&ca, &chain, &key).await;
    let issued = ask_for(&own, "db").await.unwrap();
    let svid = Svid::parse(&issued[0], &domain()).unwrap();
    assert_eq!(svid.node.as_deref(), Some("vm-1"));
    let elsewhere = ask_for(&own, "api").await.unwrap_err();
    assert_eq!(elsewhere.code(), Code::PermissionDenied, "{elsewhere}");

    let renew = |key: &KeyPair| Ask {
        csr: csr_of(key, "vm-1"),
        ..Ask::for_itself(None)
    };
    let renewed = renew(&key).send(&own).await.unwrap();
    let renewed = NodeCertificate::parse(&renewed[0], &domain()).unwrap();
    assert!(renewed.node == "vm-1" && renewed.serial != first.serial);
    let other = renew(&thief).send(&own).await.unwrap_err();
    assert!(other.message().contains("not the one"), "{other}");

    let pod_there = ca.issuer.token("db", "vm-1", |_| {});
    let pod_there = Ask::for_itself(Some(pod_there)).send(&caller).await;
    refused(pod_there, "has joined as node vm-1");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_uses_at_the_same_time_one_succeeds() {
    let ca = start().await;
    let caller = ca.caller().await;
    let token = new_token(&ca, "vm-1", false).await.unwrap();
    let keys: Vec<_> = (0..8).map(|_| KeyPair::generate().unwrap()).collect();
    let uses = keys.iter().map(|key| join(&caller, &token, key, "vm-1"));
    let joined = join_all(uses).await.into_iter().filter(Result::is_ok);
    assert_eq!(joined.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_taken_is_refused() {
    let ca = start().await;
    for (node, expected) in [
        ("a", "attestation.tokens"),
        ("", "not a node name"),
        ("../x", "not a node name"),
        ("..", "not a node name"),
    ] {
        let error = new_token(&ca, node, true).await.unwrap_err();
        assert!(error.contains(expected), "{node}: {error}");
    }
    let caller = ca.caller().await;
    let (old, new) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let token = new_token(&ca, "vm-1", false).await.unwrap();
    let chain = join(&caller, &token, &old, "vm-1").await.unwrap();
    let own = connect_as(&ca, &chain, &old).await;
    let error = new_token(&ca, "vm-1", false).await.unwrap_err();
    assert!(error.contains("--replace"), "{error}");
    let token = new_token(&ca, "vm-1", true).await.unwrap();
    ask_for(&own, "db").await.unwrap();
    join(&caller, &token, &new, "vm-1").await.unwrap();
    refused(ask_for(&own, "db").await, "another machine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_machine_cannot_come_back() {
    let ca = start().await;
    let caller = ca.caller().await;
    let key = KeyPair::generate().unwrap();
    let used = new_token(&ca, "vm-1", false).await.unwrap();
    let chain = join(&caller, &used, &key, "vm-1").await.unwrap();
    let own = connect_as(&ca, &chain, &key).await;
    let unused = new_token(&ca, "vm-1", true).await.unwrap();
    let node = || Target::Node("vm-1".into());
    let revoked = ca.authority.revoke(node(), Reason::KeyCompromise).await;
    revoked.unwrap();
    refused(ask_for(&own, "db").await, "keyCompromise");
    let error = new_token(&ca, "vm-1", true).await.unwrap_err();
    assert!(error.contains("revoked"), "{error}");
    ca.authority.unrevoke(node()).await.unwrap();
    refused(ask_for(&own, "db").await, "new join token");
    for token in [used, unused] {
        refused(join(&caller, &token, &key, "vm-1").await, "unknown");
        refused(ask_for(&own, "db").await, "new join token");
    }
    let token = new_token(&ca, "vm-1", false).await.unwrap();
    join(&caller, &token, &key, "vm-1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tunnel_and_no_federated_domain_accepts_a_nodes_certificate() {
    let (ca, partners) = (start().await, start().await);
    let key = KeyPair::generate().unwrap();
    let token = new_token(&ca, "vm-1", false).await.unwrap();
    let caller = ca.caller().await;
    let node = join(&caller, &token, &key, "vm-1").await.unwrap();
    let workload = Ask::good().send(&caller).await.unwrap();
    let bundle = |domain: &str, roots| TrustBundle::of_roots(domain.parse().unwrap(), roots);
    let own = TrustStore::new(Trust::fixed(bundle(DOMAIN, ca.roots())));
    let partner = TrustStore::new(Trust::fixed(bundle("partner.example", partners.roots())));
    let mut foreign = ForeignBundles::default();
    foreign.insert(bundle(DOMAIN, ca.roots()));
    partner.publish_foreign(foreign);
    for trust in [own, partner] {
        let verifier = Verifier::new(Arc::new(trust), Arc::new(provider())).unwrap();
        let name = ServerName::try_from("10.0.0.1").unwrap();
        let verify = |leaf: &CertificateDer<'_>| {
            let now = UnixTime::now();
            let client = verifier.verify_client_cert(leaf, &[], now).map(drop);
            let server = verifier.verify_server_cert(leaf, &[], &name, &[], now);
            [client, server.map(drop)].map(|verified| verified.map_err(|e| explain(&e)))
        };
        assert_eq!(verify(&workload[0]), [Ok(()), Ok(())]);
        for refused in verify(&node[0]) {
            let why = refused.unwrap_err();
            assert!(
                why.contains("not the SPIFFE ID of a service account"),
                "{why}"
            );
        }
    }
}

/// A machine with its daemon's files in a directory of its own.
struct Vm {
    folder: tempfile::TempDir,
    server: CaServer,
}

impl Vm {
    fn new(ca: &Ca) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let join = Join {
            node: "vm-1".into(),
            trust_domain: domain(),
            token_file: folder.path().join("token"),
            directory: folder.path().join("node"),
        };
        let server = CaServer {
            proof: Proof::Join(join),
            ..ca.server("a")
        };
        Self { folder, server }
    }

    fn put_token(&self, token: &str) {
        fs::write(self.folder.path().join("token"), format!("{token}\n")).unwrap();
    }

    fn remove_token(&self) {
        fs::remove_file(self.folder.path().join("token")).unwrap();
    }

    fn kept(&self) -> PathBuf {
        self.folder.path().join("node/node.pem")
    }

    fn daemon(&self) -> Result<CaClient, String> {
        let lifetime = Duration::from_secs(3600);
        let started = CaClient::start(self.server.clone(), domain(), lifetime);
        started.map_err(|error| error.to_string())
    }
}

/// Requests a certificate of `db` until the answer is what `expected` says, as the daemon does.
async fn request<T>(
    daemon: &CaClient,
    expected: impl Fn(Result<(), IssueError>) -> Option<T>,
) -> T {
    let (db, csr) = (identity("db"), csr(|_| {}).1);
    let csr = rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(csr.as_bytes());
    let csr = csr.unwrap();
    for _ in 0..600 {
        if let Some(found) = expected(daemon.issue(&db, &csr).await.map(drop)) {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not within half a minute");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_joins_and_is_known_after_a_restart() {
    let ca = start().await;
    let vm = Vm::new(&ca);
    let error = vm.daemon().unwrap_err();
    assert!(
        error.contains("ca.joinTokenFile: ") && error.contains("has not joined yet"),
        "{error}"
    );
    vm.put_token(&new_token(&ca, "vm-1", false).await.unwrap());
    let daemon = vm.daemon().unwrap();
    request(&daemon, Result::ok).await;
    eventually("the status says so", || {
        let status = serde_json::to_value(daemon.health()?.status()).ok()?;
        (status["authentication"]["node"] == "vm-1").then_some(())
    })
    .await;
    drop(daemon);

    // The machine has its key and no token, and the CA is another process with the same state.
    vm.remove_token();
    let kept = fs::metadata(vm.kept()).unwrap();
    assert_eq!(kept.mode() & 0o777, 0o600);
    let files = fs::read_dir(vm.folder.path().join("node")).unwrap();
    assert_eq!(files.count(), 1, "neither drafts nor the key of the join");
    let waiting = new_token(&ca, "vm-2", false).await.unwrap();
    let (folder, issuer, address) = ca.stop().await;
    let address = address.to_string();
    let ca = Ca::start_in(folder, issuer, &address, Limits::default()).await;
    ca.run_pods([pod("db", "vm-1")]);
    request(&vm.daemon().unwrap(), Result::ok).await;
    let key = KeyPair::generate().unwrap();
    let caller = ca.caller().await;
    join(&caller, &waiting, &key, "vm-2").await.unwrap();

    // Without its key it needs a new token, and says so.
    fs::remove_file(vm.kept()).unwrap();
    vm.put_token(&waiting);
    let daemon = vm.daemon().unwrap();
    let why = request(&daemon, |answer| {
        let why = answer.unwrap_err().why;
        why.contains("cannot join").then_some(why)
    })
    .await;
    assert!(
        why.contains("auth-daemon ca token create --node vm-1"),
        "{why}"
    );
    assert!(!why.contains(&waiting), "{why}");
    drop(daemon);
    vm.put_token(&new_token(&ca, "vm-1", true).await.unwrap());
    request(&vm.daemon().unwrap(), Result::ok).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_joins_a_ca_that_does_not_know_its_certificate() {
    let (ca, other) = (start().await, start().await);
    let mut vm = Vm::new(&ca);
    vm.put_token(&new_token(&ca, "vm-1", false).await.unwrap());
    request(&vm.daemon().unwrap(), Result::ok).await;
    // This one has another root, so the handshake fails.
    vm.server = CaServer {
        proof: vm.server.proof.clone(),
        ..other.server("a")
    };
    vm.put_token(&new_token(&other, "vm-1", false).await.unwrap());
    request(&vm.daemon().unwrap(), Result::ok).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_that_cannot_be_written_is_used() {
    let ca = start().await;
    let vm = Vm::new(&ca);
    vm.put_token(&new_token(&ca, "vm-1", false).await.unwrap());
    let status = |daemon: &CaClient| serde_json::to_value(daemon.health()?.status()).ok();
    let until = |status: &serde_json::Value| {
        let until = status["authentication"]["notAfter"].as_str();
        until.map(str::to_owned)
    };
    let daemon = vm.daemon().unwrap();
    let first = eventually("it joins", || until(&status(&daemon)?)).await;
    drop(daemon);
    vm.remove_token();
    let (kept, directory) = (fs::read(vm.kept()).unwrap(), vm.folder.path().join("node"));
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(directory, everybody).unwrap();
    // Its end is written in seconds.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let daemon = vm.daemon().unwrap();
    eventually("it renews, and says what is wrong", || {
        let status = status(&daemon)?;
        let wrong = status["lastError"].as_str()?.contains("ca.nodeDirectory");
        (wrong && until(&status)? > first).then_some(())
    })
    .await;
    assert_eq!(fs::read(vm.kept()).unwrap(), kept);
    request(&daemon, Result::ok).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_removes_what_an_interrupted_join_has_left() {
    let ca = start().await;
    let vm = Vm::new(&ca);
    vm.put_token(&new_token(&ca, "vm-1", false).await.unwrap());
    request(&vm.daemon().unwrap(), Result::ok).await;
    vm.remove_token();
    let joining = vm.kept().with_file_name("joining.pem");
    for name in [".node.pem.0123", ".joining.pem.0123", "joining.pem"] {
        fs::copy(vm.kept(), vm.kept().with_file_name(name)).unwrap();
    }
    drop(vm.daemon().unwrap());
    let names = || {
        let files = fs::read_dir(vm.kept().parent().unwrap()).unwrap();
        let mut names: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["node.pem"]);

    // The CA knows the key of a join whose answer was lost, and its token is gone: it joins with a new key.
    let lost = fs::read(vm.kept()).unwrap();
    fs::rename(vm.kept(), &joining).unwrap();
    vm.put_token(&new_token(&ca, "vm-1", true).await.unwrap());
    let daemon = vm.daemon().unwrap();
    request(&daemon, Result::ok).await;
    assert_eq!(names(), ["node.pem"]);
    let key = |pem: &[u8]| {
        KeyPair::from_pem(std::str::from_utf8(pem).unwrap())
            .unwrap()
            .serialize_der()
    };
    assert_ne!(key(&fs::read(vm.kept()).unwrap()), key(&lost));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_does_not_use_another_nodes_certificate() {
    let ca = start().await;
    let mut vm = Vm::new(&ca);
    vm.put_token(&new_token(&ca, "vm-1", false).await.unwrap());
    request(&vm.daemon().unwrap(), Result::ok).await;
    if let Proof::Join(join) = &mut vm.server.proof {
        join.node = "vm-2".into();
    }
    let error = vm.daemon().unwrap_err();
    assert!(
        error.contains("is of node vm-1, but nodeName is vm-2"),
        "{error}"
    );
    let mut readable = fs::metadata(vm.kept()).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut readable, 0o640);
    fs::set_permissions(vm.kept(), readable).unwrap();
    let error = vm.daemon().unwrap_err();
    assert!(
        error.contains("ca.nodeDirectory: ") && error.contains("mode 640"),
        "{error}"
    );
}
