//! What a change of policies or of the configuration would end: `auth-daemon policy check --diff` and `auth-daemon check` on a
//! node with a daemon, and whether the prediction comes true.

use std::{fs, path::PathBuf};

use mesh_tests::{App, Context, Finished, PodSpec, Result, TIMEOUT, eventually};
use serde_json::{Value, json};

use crate::common::pair::Pair;

/// An AuthorizationPolicy for the pods with the label `app=web`.
fn authorization(action: &str, account: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}}, "action": action,
            "rules": [{"from": [{"source": {"serviceAccounts": [account]}}]}],
        },
    })
}

/// The pair, with a third pod, and a connection that stays open.
struct Scene {
    pair: Pair,
    connection: App,
    _echo: App,
}

impl Scene {
    fn start() -> Result<Self> {
        let other = PodSpec::new("other").on("a").service_account("other");
        let pair = Pair::start_with(&Default::default(), |builder| builder.pod(other))?;
        let echo = pair.web.app("echo-server --port 8080")?.listening()?;
        let to = pair.web.at(8080);
        let connection = pair
            .client
            .app(&format!("connect --to {to} --send hi --read"))?;
        eventually(TIMEOUT, "an open connection", || {
            let connections = pair.far.status().ok()?.connections;
            let mut open = connections.iter();
            open.any(|open| open.bytes_to_client == 2).then_some(())
        })?;
        Ok(Self {
            pair,
            connection,
            _echo: echo,
        })
    }

    fn file(&self, name: &str, content: &Value) -> Result<PathBuf> {
        let path = self.pair.mesh.node("b").folder().join(name);
        fs::write(&path, content.to_string())?;
        Ok(path)
    }

    /// Compares no policies with `new`, on the server's node.
    fn diff(&self, new: &Value, more: &[&str]) -> Result<Finished> {
        let old = self.file(
            "old.json",
            &json!({"apiVersion": "v1", "kind": "List", "items": []}),
        )?;
        let new = self.file("new.json", new)?;
        let (old, new) = (old.display().to_string(), new.display().to_string());
        let arguments = [&["policy", "check", "--diff", &old, &new], more].concat();
        self.pair.mesh.node("b").auth(&arguments)
    }
}

fn parsed(finished: &Finished) -> Result<Value> {
    serde_json::from_str(&finished.stdout).with_context(|| finished.stderr.clone())
}

/// The one change in a list of `differences`.
fn only<'a>(differences: &'a Value, list: &str) -> Result<&'a Value> {
    match differences[list].as_array().map(Vec::as_slice) {
        Some([change]) => Ok(change),
        _ => anyhow::bail!("not one change in {list}: {differences}"),
    }
}

#[test]
fn a_diff_names_the_open_connections_that_then_end() -> Result<()> {
    let mut scene = Scene::start()?;
    let denies = authorization("DENY", "client");

    let finished = scene.diff(&denies, &["-o", "json"])?;
    assert_eq!(finished.code(), Some(1), "{}", finished.stderr);
    let differences = parsed(&finished)?;
    let ending = only(&differences, "ending")?;
    assert_eq!(ending["client"], "default/client");
    assert_eq!(ending["server"], "default/web");
    assert_eq!(ending["ports"], "8080");
    assert_eq!(ending["count"], 1);
    let after = "denied by AuthorizationPolicy default/web rules[0]";
    assert_eq!(ending["after"], after);
    assert_eq!(differences["observed"], 1, "{differences}");

    let table = scene.diff(&denies, &[])?.stdout;
    assert!(
        table.contains("OPEN CONNECTIONS THAT WOULD END (1)\n"),
        "{table}"
    );

    scene.pair.mesh.manifests().apply(&denies)?;
    let ended = scene.connection.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    Ok(())
}

#[test]
fn a_diff_reports_refused_calls_when_open_connections_stay() -> Result<()> {
    let scene = Scene::start()?;
    let finished = scene.diff(&authorization("DENY", "other"), &["-o", "json"])?;
    assert_eq!(finished.code(), Some(1), "{}", finished.stderr);
    let differences = parsed(&finished)?;
    assert_eq!(differences["ending"], json!([]), "{differences}");
    let refused = only(&differences, "refused")?;
    assert_eq!(refused["client"], "default/other");

    let finished = scene.diff(&authorization("AUDIT", "client"), &["-o", "json"])?;
    assert_eq!(finished.code(), Some(0), "{}", finished.stdout);
    Ok(())
}

#[test]
fn a_diff_judges_connections_of_a_saved_status() -> Result<()> {
    let scene = Scene::start()?;
    let status = scene.file("status.json", &scene.pair.far.status_json()?)?;
    let status = status.display().to_string();
    let denies = authorization("DENY", "client");
    let finished = scene.diff(&denies, &["-o", "json", "--connections", &status])?;
    assert_eq!(parsed(&finished)?["ending"][0]["client"], "default/client");

    let other = scene.file("other.json", &json!({"pods": []}))?;
    let other = other.display().to_string();
    let finished = scene.diff(&denies, &["--connections", &other])?;
    assert_eq!(finished.code(), Some(2));
    assert!(
        finished.stderr.contains("it has no connections"),
        "{}",
        finished.stderr
    );
    Ok(())
}

#[test]
fn a_check_names_the_open_connections_that_a_configuration_would_end() -> Result<()> {
    let scene = Scene::start()?;
    let mut denies = authorization("DENY", "client");
    denies["metadata"]["namespace"] = "elsewhere".into();
    denies["spec"]["rules"] = json!([{}]);
    scene.pair.mesh.manifests().apply(&denies)?;
    let node = scene.pair.mesh.node("b");
    let check = |config: PathBuf| -> Result<String> {
        let checked = node.auth(&["check", "--config", &config.display().to_string()])?;
        Ok(checked.ok()?.stdout)
    };
    let config = node.folder().join("auth-daemon.yaml");
    let mut settings: Value = serde_json::from_slice(&fs::read(&config)?)?;
    let stdout = check(config)?;
    assert!(!stdout.contains("would end"), "{stdout}");

    settings["policy"] = json!({"rootNamespace": "elsewhere"});
    let stdout = check(scene.file("changed.yaml", &settings)?)?;
    let ending = "WARNING open connections that would end: 1 from default/client to default/web, port 8080: denied by \
                  AuthorizationPolicy elsewhere/web rules[0]";
    assert!(stdout.contains(ending), "{stdout}");
    Ok(())
}

/// A namespace with the label that puts its pods into the mesh, or takes them out.
fn labelled(namespace: &str, label: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": namespace, "labels": {"auth-daemon.io/mesh": label}},
    })
}

#[test]
fn a_diff_names_the_open_connections_of_pods_that_leave_the_mesh() -> Result<()> {
    let mut scene = Scene::start()?;
    let leaves = labelled("default", "disabled");

    let finished = scene.diff(&leaves, &["-o", "json"])?;
    assert_eq!(finished.code(), Some(1), "{}", finished.stderr);
    let differences = parsed(&finished)?;
    let ending = only(&differences, "ending")?;
    assert_eq!(ending["client"], "default/client");
    assert_eq!(ending["server"], "default/web");
    assert_eq!(ending["after"], "default/client leaves the mesh");

    let manifests = scene.pair.mesh.manifests();
    manifests.write("namespace.json", &leaves.to_string())?;
    let ended = scene.connection.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    Ok(())
}

/// Under STRICT, a pod of `kube-system` loses its callers in plaintext.
#[test]
fn a_diff_names_the_callers_that_a_namespace_loses_when_it_joins_the_mesh() -> Result<()> {
    let dns = PodSpec::new("dns").namespace("kube-system").on("b");
    let pair = Pair::start_with(&Default::default(), |builder| builder.pod(dns))?;
    let outside = labelled("kube-system", "disabled");
    let manifests = pair.mesh.manifests();
    manifests.write("namespace.json", &outside.to_string())?;
    let dns = pair.mesh.pod("kube-system/dns");
    let _echo = dns.app("echo-server --port 53")?.listening()?;
    let to = dns.at(53);
    let mut connection = eventually(TIMEOUT, "an answer in plaintext", || {
        let dial = format!("chat --to {to}");
        let mut chat = pair.mesh.outside().app(&dial).ok()?;
        chat.event("round", TIMEOUT).ok()?;
        Some(chat)
    })?;

    let node = pair.mesh.node("b");
    let joins = labelled("kube-system", "enabled");
    let [old, new] = [("old.json", &outside), ("new.json", &joins)].map(|(name, manifest)| {
        let path = node.folder().join(name);
        fs::write(&path, manifest.to_string()).map(|()| path.display().to_string())
    });
    let finished = node.auth(&["policy", "check", "-o", "json", "--diff", &old?, &new?])?;
    assert_eq!(finished.code(), Some(1), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("Namespace kube-system"),
        "{}",
        finished.stderr
    );
    let differences = parsed(&finished)?;
    let refused = only(&differences, "refused")?;
    assert_eq!(refused["client"], "plaintext");
    assert_eq!(refused["server"], "kube-system/dns");
    assert_eq!(refused["before"], "not in the mesh");

    manifests.write("namespace.json", &joins.to_string())?;
    let ended = connection.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    Ok(())
}
