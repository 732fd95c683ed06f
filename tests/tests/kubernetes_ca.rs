//! The CA in a cluster: the real program against a real API server, with no other rights than the chart gives it.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use mesh_tests::{
    Context, Finished, Kubernetes, Process, Result, TIMEOUT, auth_daemon, chart, eventually,
    eventually_ok,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const NAMESPACE: &str = "auth-system";
/// The ConfigMap with the CA's roots.
const ROOTS: &str = "auth-ca-root";
const LABEL: &str = "auth-daemon.io/ca-leader";
/// A lease and a half.
const HAND_OVER: Duration = Duration::from_secs(60);

/// One replica.
struct Ca {
    process: Process,
    folder: PathBuf,
}

impl Ca {
    /// Starts `auth-daemon ca`. `state` names its Secrets and its Lease; replicas have it in common.
    fn start(cluster: &Kubernetes, state: &str, replica: &str, more: &Value) -> Result<Self> {
        let folder =
            std::env::temp_dir().join(format!("ca-{}-{state}-{replica}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let mut config = json!({
            "listen": "127.0.0.1:0", "serverNames": ["127.0.0.1"],
            "operatorSocket": folder.join("run/operator.sock"),
            "kubernetes": {"namespace": NAMESPACE, "stateSecret": state, "lease": state},
            "attestation": {"kubernetes": {"audience": "auth-daemon-ca"}},
            "log": {"format": "json", "level": "info"},
        });
        for (field, value) in more.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        let file = folder.join("ca.yaml");
        fs::write(&file, format!("{config:#}"))?;
        let mut command = Command::new(auth_daemon()?);
        command
            .args(["ca", "--config"])
            .arg(&file)
            .env("KUBECONFIG", cluster.kubeconfig_of(NAMESPACE, "auth-ca")?)
            .env_remove("POD_NAME");
        if !replica.is_empty() {
            command.env("POD_NAME", replica);
        }
        let process = Process::spawn(command)?;
        Ok(Self { process, folder })
    }

    /// Asks it what an operator asks.
    fn ask(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(auth_daemon()?);
        command
            .arg("ca")
            .args(arguments)
            .arg("--socket")
            .arg(self.folder.join("run/operator.sock"));
        Process::spawn(command)?.finish(TIMEOUT)
    }

    /// The port that it listens on.
    fn port(&self) -> Result<u16> {
        let log = self.process.stderr();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let started = { lines }
            .find(|line| line["message"] == "CA started")
            .with_context(|| format!("not started: {log}"))?;
        let address: SocketAddr = started["address"].as_str().context("no address")?.parse()?;
        Ok(address.port())
    }

    fn status(&self) -> Result<Value> {
        let answer = self.ask(&["status", "--json"])?.ok()?;
        Ok(serde_json::from_str(&answer.stdout)?)
    }

    /// Waits until it leads; gives its status.
    fn leads(&self) -> Result<Value> {
        eventually_ok(HAND_OVER, "this replica's lead", || {
            let status = self.status()?;
            ensure(status["leader"] == true, &status)?;
            Ok(status)
        })
        .with_context(|| self.process.stderr())
    }
}

impl Drop for Ca {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn ensure(holds: bool, evidence: &dyn std::fmt::Display) -> Result<()> {
    holds
        .then_some(())
        .with_context(|| format!("not yet: {evidence}"))
}

fn cluster(test: &str) -> Option<Arc<Kubernetes>> {
    let cluster = Kubernetes::shared(test)?;
    cluster
        .apply(&chart::rendered_file())
        .expect("the CA's rights");
    Some(cluster)
}

fn labelled(cluster: &Kubernetes) -> Vec<String> {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods?labelSelector={LABEL}%3Dtrue");
    let list = cluster.get(&path).expect("an answer").expect("a list");
    let pods = list["items"].as_array().expect("items").iter();
    pods.map(|pod| {
        pod["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    })
    .collect()
}

#[test]
fn replicas_hand_the_ca_over_and_nothing_is_lost() -> Result<()> {
    let Some(cluster) = cluster("replicas_hand_the_ca_over_and_nothing_is_lost") else {
        return Ok(());
    };
    for (name, address) in [("ca-a", "10.9.0.1"), ("ca-b", "10.9.0.2")] {
        cluster.pod(NAMESPACE, name, "auth-ca", "node-a", address)?;
    }
    let none = json!({});
    let mut a = Ca::start(&cluster, "handed", "ca-a", &none)?;
    let began = a.leads()?;
    let b = Ca::start(&cluster, "handed", "ca-b", &none)?;
    let root = &began["roots"][0]["sha256"];
    assert!(root.is_string(), "{began}");
    eventually(TIMEOUT, "the label", || {
        (labelled(&cluster) == ["ca-a"]).then_some(())
    })?;
    let waits = eventually_ok(TIMEOUT, "the other replica", || b.status())?;
    assert_eq!(waits["leader"], false, "{waits}");
    let refused = b.ask(&["revoke", "--node", "node-x"])?;
    assert!(
        !refused.status.success() && refused.stderr.contains("not the leader"),
        "{refused:?}"
    );

    let web = "spiffe://cluster.local/ns/default/sa/web";
    a.ask(&["revoke", "--identity", web, "--reason", "keyCompromise"])?
        .ok()?;
    a.process.kill()?;
    let taken = b.leads()?;
    assert_eq!(&taken["roots"][0]["sha256"], root, "the same root");
    assert_eq!(taken["revoked"]["identities"][0]["name"], web, "{taken}");
    eventually(TIMEOUT, "the label", || {
        (labelled(&cluster) == ["ca-b"]).then_some(())
    })?;

    // A suspended leader does not know that it was replaced; when it resumes, it must not write.
    drop(a);
    let a = Ca::start(&cluster, "handed", "ca-a", &none)?;
    b.process.suspend()?;
    let back = a.leads()?;
    assert_eq!(&back["roots"][0]["sha256"], root);
    b.process.resume()?;
    let late = b.ask(&["revoke", "--node", "node-late"])?;
    assert!(!late.status.success(), "{late:?}");
    a.ask(&["revoke", "--node", "node-x"])?.ok()?;
    let nodes = &a.status()?["revoked"]["nodes"];
    assert_eq!(nodes.as_array().map(Vec::len), Some(1), "{nodes}");
    assert_eq!(nodes[0]["name"], "node-x");

    // When it is asked to stop, it does not make the other one wait for the lease.
    let mut a = a;
    a.process.signal(Signal::SIGTERM)?;
    let status = a.process.wait(TIMEOUT)?;
    assert!(status.success(), "{status}: {}", a.process.stderr());
    let last = b.leads()?;
    assert_eq!(&last["roots"][0]["sha256"], root);
    assert_eq!(last["revoked"]["nodes"], *nodes);
    eventually(TIMEOUT, "the label", || {
        (labelled(&cluster) == ["ca-b"]).then_some(())
    })?;
    Ok(())
}

/// The contents of a Secret, in files.
fn files(cluster: &Kubernetes, namespace: &str, name: &str, into: &Path) -> Result<Option<Value>> {
    let path = format!("/api/v1/namespaces/{namespace}/secrets/{name}");
    let Some(secret) = cluster.get(&path)? else {
        return Ok(None);
    };
    fs::create_dir_all(into)?;
    let data: BTreeMap<String, String> = serde_json::from_value(secret["data"].clone())?;
    for (key, base64) in data {
        let encoded = into.join(format!("{key}.base64"));
        fs::write(&encoded, base64)?;
        let mut command = Command::new("base64");
        command.arg("--decode").arg(&encoded);
        fs::write(
            into.join(key),
            Process::spawn(command)?.finish(TIMEOUT)?.ok()?.stdout,
        )?;
    }
    Ok(Some(secret))
}

fn openssl(folder: &Path, arguments: &str) -> Result<String> {
    let mut command = Command::new("openssl");
    command.args(arguments.split(' ')).current_dir(folder);
    Ok(Process::spawn(command)?.finish(TIMEOUT)?.ok()?.stdout)
}

fn serial(folder: &Path) -> Result<String> {
    openssl(folder, "x509 -in cert-chain.pem -noout -serial")
}

#[test]
fn secrets_with_certificates_follow_their_service_accounts() -> Result<()> {
    let Some(cluster) = cluster("secrets_with_certificates_follow_their_service_accounts") else {
        return Ok(());
    };
    let folder = std::env::temp_dir().join(format!("ca-secrets-{}", std::process::id()));
    for namespace in ["legacy", "second"] {
        cluster.namespace(namespace)?;
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": "auth-ca-secrets"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "auth-ca-secrets"},
            "subjects": [{"kind": "ServiceAccount", "name": "auth-ca", "namespace": NAMESPACE}],
        });
        let path =
            format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings");
        cluster.create(&path, &binding)?;
    }
    let account = cluster.service_account("legacy", "web")?;
    cluster.service_account("legacy", "taken")?;
    cluster.service_account("second", "api")?;
    let foreign = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "istio.io/key-and-cert",
        "metadata": {"name": "istio.taken"}, "stringData": {"key.pem": "somebody's"},
    });
    let foreign = cluster.create("/api/v1/namespaces/legacy/secrets", &foreign)?;
    let config = |namespaces: &[&str]| {
        json!({
            "secrets": {"namespaces": namespaces}, "certificateLifetime": "60s", "rotationSpread": "1s",
        })
    };
    let ca = Ca::start(&cluster, "secrets", "", &config(&["legacy", "second"]))?;
    ca.leads()?;
    let web = folder.join("web");
    let get = || files(&cluster, "legacy", "istio.web", &web);
    let appears = |what: &str, holds: &dyn Fn(&Value) -> Result<bool>| {
        eventually_ok(HAND_OVER, what, || {
            let secret = get()?.context("no Secret")?;
            ensure(holds(&secret)?, &secret["metadata"])?;
            Ok(secret)
        })
        .with_context(|| ca.process.stderr())
    };

    // It appears, and openssl agrees with what is in it.
    let secret = appears("a new account's Secret", &|_| Ok(true))?;
    assert_eq!(secret["type"], "istio.io/key-and-cert");
    let owner = &secret["metadata"]["ownerReferences"][0];
    assert_eq!(owner["uid"], account["metadata"]["uid"], "{owner}");
    openssl(
        &web,
        "verify -x509_strict -purpose sslserver -CAfile root-cert.pem cert-chain.pem",
    )?;
    let text = openssl(
        &web,
        "x509 -in cert-chain.pem -noout -ext subjectAltName,keyUsage",
    )?;
    assert!(
        text.contains("URI:spiffe://cluster.local/ns/legacy/sa/web"),
        "{text}"
    );
    assert_eq!(
        openssl(&web, "x509 -in cert-chain.pem -noout -pubkey")?,
        openssl(&web, "pkey -in key.pem -pubout")?
    );
    let first = serial(&web)?;

    // Revoked: another one.
    let number = first.trim().trim_start_matches("serial=").to_owned();
    ca.ask(&["revoke", "--serial", &number, "--reason", "superseded"])?
        .ok()?;
    appears("another certificate for a revoked one", &|_| {
        Ok(serial(&web)? != first)
    })?;
    let second = serial(&web)?;
    // A new root: the bundle holds both, at once.
    ca.ask(&["rotate-root"])?.ok()?;
    let roots = || fs::read_to_string(web.join("root-cert.pem"));
    appears("both roots", &|_| {
        Ok(roots()?.matches("BEGIN CERTIFICATE").count() == 2)
    })?;
    openssl(&web, "verify -CAfile root-cert.pem cert-chain.pem")?;
    // Renewed at half of its life, without being asked.
    appears("a renewed certificate", &|_| Ok(serial(&web)? != second))?;
    openssl(&web, "verify -CAfile root-cert.pem cert-chain.pem")?;
    // A damaged or deleted one is created again.
    let path = "/api/v1/namespaces/legacy/secrets/istio.web";
    cluster.delete(path)?;
    appears("a deleted Secret", &|_| Ok(true))?;
    cluster.merge(path, &json!({"data": {"key.pem": "cnViYmlzaA=="}}))?;
    appears("a damaged Secret's repair", &|_| {
        Ok(fs::read_to_string(web.join("key.pem"))?.contains("PRIVATE KEY"))
    })?;

    // A Secret that something else created is left alone, and this is logged.
    let still = cluster
        .get("/api/v1/namespaces/legacy/secrets/istio.taken")?
        .context("gone")?;
    assert_eq!(still, foreign);
    assert!(
        ca.process.stderr().contains("legacy/istio.taken"),
        "{}",
        ca.process.stderr()
    );
    assert!(
        !ca.process.stderr().contains("PRIVATE KEY"),
        "a key in the log"
    );

    // Gone with its account.
    cluster.delete("/api/v1/namespaces/legacy/serviceaccounts/web")?;
    let gone = |namespace: &str, name: &str| {
        let path = format!("/api/v1/namespaces/{namespace}/secrets/{name}");
        eventually_ok(HAND_OVER, "the Secret's end", || {
            ensure(cluster.get(&path)?.is_none(), &path)
        })
    };
    gone("legacy", "istio.web").with_context(|| ca.process.stderr())?;

    // Gone with its namespace's selection, even if that changed while no CA ran.
    drop(ca);
    let api = "/api/v1/namespaces/second/secrets/istio.api";
    assert!(cluster.get(api)?.is_some());
    let ca = Ca::start(&cluster, "secrets", "", &config(&["legacy"]))?;
    gone("second", "istio.api").with_context(|| ca.process.stderr())?;
    let still = cluster
        .get("/api/v1/namespaces/legacy/secrets/istio.taken")?
        .context("gone")?;
    assert_eq!(still, foreign);
    fs::remove_dir_all(&folder)?;
    Ok(())
}

#[test]
fn a_person_acts_as_the_account_whose_tokens_rbac_lets_her_create() -> Result<()> {
    let test = "a_person_acts_as_the_account_whose_tokens_rbac_lets_her_create";
    let Some(cluster) = cluster(test) else {
        return Ok(());
    };
    const SHOP: &str = "connect-shop";
    cluster.namespace(SHOP)?;
    for account in ["alice", "support", "web"] {
        cluster.service_account(SHOP, account)?;
    }
    // She may act as `support`, and find the service.
    let rights = json!([
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": ["support"], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [ROOTS], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["services", "pods"], "verbs": ["get", "list"]},
    ]);
    cluster.grant(Some(SHOP), "connect", (SHOP, "alice"), &rights)?;
    cluster.pod(SHOP, "web", "web", "node-a", "10.50.0.1")?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    cluster.create(&format!("/api/v1/namespaces/{SHOP}/services"), &service)?;

    let start = |state: &str, people: &str| {
        let attestation = json!({"kubernetes": {"audience": "auth-ca", "people": people}});
        let state = json!({"namespace": NAMESPACE, "stateSecret": state, "lease": state, "rootConfigMap": ROOTS});
        let ca = Ca::start(
            &cluster,
            people,
            "",
            &json!({"kubernetes": state, "attestation": attestation}),
        )?;
        ca.leads()?;
        Ok::<_, mesh_tests::Error>(ca)
    };
    // As alice, by her kubeconfig. The command runs once there is a certificate.
    let alice = cluster.kubeconfig_of(SHOP, "alice")?;
    let connect = |ca: &Ca, account: &str| {
        let port = ca.port()?;
        let mut command = Command::new(auth_daemon()?);
        command
            .env("KUBECONFIG", &alice)
            .args([
                "connect",
                &format!("{SHOP}/web:80"),
                "--as",
                &format!("{SHOP}/{account}"),
            ])
            .args([
                "--ca",
                &format!("127.0.0.1:{port}"),
                "--port-forward",
                "never",
            ])
            .args(["--", "sh", "-c", "echo at $AUTH_DAEMON_ADDRESS"]);
        Process::spawn(command)?.finish(TIMEOUT)
    };
    let ca = start("connect", "allow")?;
    let connected = eventually_ok(HAND_OVER, "the CA's roots in the namespace", || {
        connect(&ca, "support")?.ok()
    })
    .with_context(|| ca.process.stderr())?;
    assert!(
        connected.stdout.starts_with("at 127.0.0.1:"),
        "{connected:?}"
    );

    // Her name is proved once she may post her key. The chart lets the CA look it up where people are allowed.
    let user = format!("system:serviceaccount:{SHOP}:alice");
    assert!(
        connected.stderr.contains("access logs name the token"),
        "{connected:?}"
    );
    for (name, verb, account) in [
        ("connect-post", "create", (SHOP, "alice")),
        ("connect-look-up", "get", (NAMESPACE, "auth-ca")),
    ] {
        let rules = json!([{
            "apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests"], "verbs": [verb],
        }]);
        cluster.grant(None, name, account, &rules)?;
    }
    eventually_ok(TIMEOUT, "her name", || {
        connect(&ca, "support")?.ok()?;
        let log = ca.process.stderr();
        ensure(
            log.contains(&format!("\"person\":\"kubernetes:{user}\"")),
            &log,
        )
    })?;

    // Whose tokens she may not create.
    let refused = connect(&ca, "web")?;
    let advice = "allows create on serviceaccounts/token (resourceNames: [web])";
    assert!(
        !refused.status.success() && refused.stderr.contains(advice),
        "{refused:?}"
    );

    // Both audit logs have the token's ID.
    let log = ca.process.stderr();
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let issued = { lines }
        .find(|line| line["event"] == "issued")
        .context("no certificate is audited")?;
    assert_eq!(
        issued["identity"],
        format!("spiffe://cluster.local/ns/{SHOP}/sa/support")
    );
    let caller = issued["caller"].as_str().context("no caller")?;
    let id = caller
        .strip_prefix("person kubernetes-token:")
        .context(caller.to_owned())?;
    let requested = eventually_ok(TIMEOUT, "the request in the API server's audit log", || {
        let audited = cluster.token_requests()?.into_iter();
        let key = "authentication.kubernetes.io/issued-credential-id";
        { audited }
            .find(|event| event["annotations"][key] == format!("JTI={id}"))
            .context("not yet")
    })?;
    assert_eq!(requested["user"]["username"], user, "{requested}");
    drop(ca);

    // Without the configuration, nobody may.
    let ca = start("connect", "refuse")?;
    let refused = connect(&ca, "support")?;
    let why = "attestation.kubernetes.people";
    assert!(
        !refused.status.success() && refused.stderr.contains(why),
        "{refused:?}"
    );
    Ok(())
}

#[test]
fn the_roots_are_in_every_namespace() -> Result<()> {
    let Some(cluster) = cluster("the_roots_are_in_every_namespace") else {
        return Ok(());
    };
    const MAP: &str = ROOTS;
    let state = json!({"namespace": NAMESPACE, "stateSecret": "roots", "lease": "roots", "rootConfigMap": MAP});
    let more = json!({"kubernetes": state, "rotationSpread": "1s"});
    let ca = Ca::start(&cluster, "roots", "", &more)?;
    let root = ca.leads()?["roots"][0]["sha256"]
        .as_str()
        .context("no root")?
        .to_owned();
    let path = |namespace: &str| format!("/api/v1/namespaces/{namespace}/configmaps/{MAP}");
    let folder = ca.folder.clone();
    // The fingerprints of the certificates in a namespace's ConfigMap.
    let published = |namespace: &str| -> Result<Vec<String>> {
        let map = cluster.get(&path(namespace))?.context("no ConfigMap")?;
        let text = map["data"]["root-cert.pem"].as_str().context("no roots")?;
        let blocks = text.split_inclusive("-----END CERTIFICATE-----\n");
        blocks
            .map(|block| {
                fs::write(folder.join("root.pem"), block)?;
                let print = openssl(&folder, "x509 -in root.pem -noout -fingerprint -sha256")?;
                let print = print.trim().split('=').nth(1).context("no fingerprint")?;
                Ok(print.replace(':', "").to_lowercase())
            })
            .collect()
    };
    let appears = |namespace: &str, what: &str, holds: &dyn Fn(&[String]) -> bool| {
        eventually_ok(HAND_OVER, what, || {
            let roots = published(namespace)?;
            ensure(holds(&roots), &format!("{roots:?}"))
        })
        .with_context(|| ca.process.stderr())
    };
    let is_root = |roots: &[String]| roots == [root.clone()];
    for namespace in ["default", "kube-system", NAMESPACE] {
        appears(
            namespace,
            "the root in a namespace that was there",
            &is_root,
        )?;
    }
    cluster.namespace("late")?;
    appears("late", "the root in a new namespace", &is_root)?;
    cluster.merge(
        &path("late"),
        &json!({"data": {"root-cert.pem": "mine", "more": "x"}}),
    )?;
    appears("late", "a changed ConfigMap's repair", &is_root)?;
    cluster.delete(&path("late"))?;
    appears("late", "a deleted ConfigMap's return", &is_root)?;
    ca.ask(&["rotate-root"])?.ok()?;
    appears("late", "both roots", &|roots| {
        roots.len() == 2 && roots.contains(&root)
    })?;
    Ok(())
}
