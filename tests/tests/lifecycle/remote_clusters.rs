//! Two clusters on one network, each with an API server of its own.

use std::{fs, net::SocketAddr};

use mesh_tests::{
    App, Context, Daemon, DaemonOptions, Kubernetes, Mesh, Nginx, PodSpec, Process, Result,
    TIMEOUT, auth_daemon, eventually, eventually_ok, two_domains::write_root,
};
use serde_json::{Value, json};

use crate::common::by_uid::publish;

const WEST: &str = "west.example";
const EAST: &str = "east.example";
const SYSTEM: &str = "auth-system";
const SECRET: &str = "/api/v1/namespaces/auth-clusters/secrets/istio-remote-secret-east";
const PODS: &str = "/api/v1/namespaces/default/pods";
const SERVICE: &str = "http://10.96.0.7/";
/// The service's port that leads to an `echo-server`, if its pods have one.
const ECHO_SERVICE: &str = "10.96.0.7:7";
const FROM_WEST: &str = "the-answer-of-the-own-cluster";
const FROM_EAST: &str = "the-answer-of-the-remote-cluster";
const NOT_TRUSTED: &str = "remote cluster's trust domain is not trusted";

/// The cluster west with node a and its pods `client` and `web-west`, and the cluster east with node b and its pod `web-east`.
/// Both have a service `web`, on different ports of their pods. Nothing says yet that `web-west` exists.
///
/// Fields are dropped in this order.
struct Stage {
    _servers: [Nginx; 2],
    _processes: [Process; 2],
    a: Daemon,
    b: Daemon,
    west: Kubernetes,
    east: Kubernetes,
    mesh: Mesh,
}

fn service(own: &Value, target: u16) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {
            "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": target}, {"name": "echo", "port": 7, "targetPort": 7}],
        },
    });
    for (name, value) in own.as_object().into_iter().flatten() {
        service["spec"][name] = value.clone();
    }
    service
}

impl Stage {
    /// Starts the clusters. With another trust domain than [`WEST`], east has a CA of its own, and each trusts the other.
    fn start(east_domain: &str) -> Result<Self> {
        let pod = |name: &str| PodSpec::new(name).service_account(name);
        let mesh = Mesh::builder()
            .node("a")
            .node("b")
            .node("c")
            .pod(pod("client").on("a"))
            .pod(pod("web-west").on("a").label("app", "web"))
            .pod(pod("web-east").on("b").label("app", "web"))
            .start()?;
        let west = mesh.start_api_server()?;
        let east = mesh.start_api_server_on(mesh.node("c"))?;
        for api in [&west, &east] {
            for namespace in [SYSTEM, "auth-clusters"] {
                api.namespace(namespace)?;
            }
        }
        let services = "/api/v1/namespaces/default/services";
        west.create(services, &service(&json!({"clusterIP": "10.96.0.7"}), 8080))?;
        east.create(services, &service(&json!({}), 9090))?;
        for (api, account) in [(&west, "client"), (&west, "web-west"), (&east, "web-east")] {
            api.service_account("default", account)?;
        }
        let processes = [
            publish(&west, &mesh.pod("client")),
            publish(&east, &mesh.pod("web-east")),
        ];
        // The same name of a node, and the same address of a pod, as in west.
        east.pod("default", "ghost", "web-east", "a", "10.77.9.9")?;
        let taken = mesh.pod("web-west").ipv4().to_string();
        east.pod("default", "thief", "web-east", "b", &taken)?;

        let bundle = |name: &str| mesh.outside().folder().join(name);
        let options = |api: &Kubernetes, own: &str, other: &str, foreign: &str| {
            let mut remote = json!({"namespace": "auth-clusters"});
            let mut federation = json!([]);
            if own != foreign {
                remote["trustDomains"] = json!([{"cluster": other, "trustDomain": foreign}]);
                federation = json!([{"trustDomain": foreign, "bundleFile": bundle(foreign)}]);
            }
            let discovery = json!({"kubernetes": {"remoteClusters": remote}});
            DaemonOptions::default()
                .trust_domain(own)
                .ca_folder(bundle(&format!("{own}.ca")))
                .setting("discovery", discovery)
                .setting("federation", federation)
                .environment("KUBECONFIG", &api.kubeconfig().display().to_string())
                .environment("POD_NAMESPACE", SYSTEM)
        };
        let a = options(&west, WEST, "east", east_domain);
        let b = options(&east, east_domain, "west", WEST);
        let a = mesh.node("a").start_daemon_with(a)?;
        let b = mesh.node("b").start_daemon_with(b)?;
        a.wait_enrolled(&["default/client"])?;
        b.wait_enrolled(&["default/web-east"])?;
        for own in [WEST, east_domain] {
            write_root(&bundle(&format!("{own}.ca")), &bundle(own))?;
        }
        let servers = [
            Nginx::start(&mesh.pod("web-west"), 8080, FROM_WEST)?,
            Nginx::start(&mesh.pod("web-east"), 9090, FROM_EAST)?,
        ];
        Ok(Self {
            _servers: servers,
            _processes: processes,
            a,
            b,
            west,
            east,
            mesh,
        })
    }

    fn ask(&self, url: &str) -> Result<Option<String>> {
        let curl = ["-sS", "-m", "10", "--noproxy", "*", url];
        let finished = self.mesh.pod("client").run("curl", curl)?;
        Ok((finished.code() == Some(0)).then_some(finished.stdout))
    }

    /// Waits until the service's answer is this one. `None`: until the connection is refused.
    fn wait_for(&self, answer: Option<&str>) -> Result<()> {
        eventually_ok(TIMEOUT, &format!("the answer {answer:?}"), || {
            let found = self.ask(SERVICE)?;
            anyhow::ensure!(found.as_deref() == answer, "{found:?}");
            Ok(())
        })
    }

    /// Starts an `echo-server` on port 7 of a pod.
    fn echo_server(&self, pod: &str) -> Result<App> {
        let pod = self.mesh.pod(pod);
        pod.app("echo-server --port 7")?.listening()
    }

    /// Whether what a pod sends to `to` comes back on a new connection.
    fn echoes(&self, from: &str, to: &str) -> Result<bool> {
        let command = format!("connect --to {to} --send hello --shutdown --read");
        let ended = self.mesh.pod(from).app(&command)?.finish(TIMEOUT)?;
        let events = ended.json_lines();
        Ok(events.last().is_some_and(|last| last["text"] == "hello"))
    }

    /// Starts an exchange between a pod and `to` that continues until it is interrupted, as soon as there can be one.
    fn chat(&self, from: &str, to: &str) -> Result<App> {
        eventually_ok(TIMEOUT, &format!("an echo from {to}"), || {
            anyhow::ensure!(self.echoes(from, to)?);
            Ok(())
        })?;
        let mut chat = self.mesh.pod(from).app(&format!("chat --to {to}"))?;
        chat.event("connected", TIMEOUT)?;
        Ok(chat)
    }

    fn status(&self) -> Result<Value> {
        let status = self.a.status_json()?;
        let cluster = status["remoteClusters"].get(0);
        Ok(cluster.context("no remote cluster")?.clone())
    }

    fn wait_for_message(&self, message: &str) -> Result<Value> {
        self.a.wait_for_log(message, TIMEOUT, says(message))
    }
}

/// Whether a line's message begins with these words.
fn says(message: &str) -> impl Fn(&Value) -> bool {
    move |line| { line["message"].as_str() }.is_some_and(|text| text.starts_with(message))
}

#[test]
fn a_service_of_two_clusters_is_the_own_ones_first_and_outlives_the_remote_api_server() -> Result<()>
{
    let test = "a_service_of_two_clusters_is_the_own_ones_first_and_outlives_the_remote_api_server";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return Ok(());
    }
    let stage = Stage::start(EAST)?;
    let capture = stage.mesh.wire().capture()?;
    stage.wait_for(None)?;

    // Its only endpoint is in the remote cluster, on a port of its own.
    stage.west.apply(&stage.east.remote_secret("east")?)?;
    stage.wait_for(Some(FROM_EAST))?;
    let id = |domain: &str, account: &str| format!("spiffe://{domain}/ns/default/sa/{account}");
    let (client, server) = (id(WEST, "client"), id(EAST, "web-east"));
    for daemon in [&stage.a, &stage.b] {
        let line = daemon.wait_for_access("the connection", TIMEOUT, |line| {
            line["result"] == "ok" && line["server_identity"] == server
        })?;
        assert_eq!(line["client_identity"], client, "{line:#}");
        assert_eq!(line["path"], "tunnel", "{line:#}");
    }
    let own_address = format!("http://{}/", stage.mesh.pod("web-east").at(9090));
    assert_eq!(stage.ask(&own_address)?.as_deref(), Some(FROM_EAST));
    let status = stage.status()?;
    assert_eq!(
        (&status["name"], &status["trustDomain"], &status["error"]),
        (&json!("east"), &json!(EAST), &Value::Null),
        "{status}"
    );
    assert_eq!(
        (&status["pods"], &status["services"]),
        (&json!(3), &json!(2)),
        "{status}"
    );

    // A node's name means this cluster's own.
    let pods: Vec<_> = stage
        .a
        .status()?
        .pods
        .into_iter()
        .map(|pod| pod.pod)
        .collect();
    assert_eq!(pods, ["default/client"]);

    // This cluster's endpoint comes first, while it is ready.
    let _web = publish(&stage.west, &stage.mesh.pod("web-west"));
    stage.a.wait_enrolled(&["default/web-west"])?;
    stage.wait_for(Some(FROM_WEST))?;
    // So does its address, which a remote pod claims, too.
    stage.a.wait_for_log("the two claims", TIMEOUT, |line| {
        { line["message"].as_str() }.is_some_and(|text| {
            text.contains("pod default/web-west") && text.contains("pod default@east/thief")
        })
    })?;
    for _ in 0..5 {
        assert_eq!(stage.ask(SERVICE)?.as_deref(), Some(FROM_WEST));
    }
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    stage
        .west
        .merge(&format!("{PODS}/web-west/status"), &unready)?;
    stage.wait_for(Some(FROM_EAST))?;

    // The known state stays in force while the remote API server is unavailable.
    stage.east.stop_server()?;
    stage.wait_for_message("remote cluster cannot be read")?;
    assert_eq!(stage.ask(SERVICE)?.as_deref(), Some(FROM_EAST));
    assert!(stage.status()?["error"].is_string());
    let page = include_str!("../../../docs/MULTICLUSTER.md");
    let (_, command) = page.rsplit_once("```sh\n").context("no command")?;
    let (command, _) = command.split_once("```").context("no end")?;
    let programs = auth_daemon()?;
    let programs = programs.parent().context("no folder")?.display();
    let mut shell = stage.mesh.node("a").place().command("sh")?;
    shell.env("PATH", format!("{programs}:{}", std::env::var("PATH")?));
    shell.args(["-c", command]);
    let shown = Process::spawn(shell)?.finish(TIMEOUT)?.ok()?.stdout;
    assert!(shown.contains("NOT READABLE since"), "{shown}");
    let metrics = stage.a.metrics()?;
    let readable = "auth_daemon_remote_cluster_readable{cluster=\"east\"} 0\n";
    assert!(metrics.contains(readable), "{metrics}");
    stage.east.start_server()?;
    stage.wait_for_message("remote cluster can be read again")?;
    assert_eq!(stage.status()?["error"], Value::Null);
    assert_eq!(stage.ask(SERVICE)?.as_deref(), Some(FROM_EAST));

    // Without its Secret, nothing of it is left.
    stage.west.delete(SECRET)?;
    stage.wait_for_message("remote cluster removed")?;
    stage.wait_for(None)?;
    assert_eq!(
        stage.ask(&own_address)?,
        None,
        "an address that was of the mesh"
    );
    let wire = capture.stop()?;
    for answer in [FROM_WEST, FROM_EAST] {
        assert!(
            !wire.contains(answer.as_bytes()),
            "{answer} is readable on the wire"
        );
    }
    Ok(())
}

#[test]
fn a_kubeconfig_that_runs_programs_or_reads_files_is_refused() -> Result<()> {
    let test = "a_kubeconfig_that_runs_programs_or_reads_files_is_refused";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return Ok(());
    }
    let stage = Stage::start(WEST)?;
    let ran = stage.mesh.outside().folder().join("ran");
    let file = stage.east.remote_secret("east")?;
    let good = fs::read_to_string(&file)?;
    let exec = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never",
        "command": "touch", "args": [ran],
    });
    let bad = good.replace("user: {token: ", &format!("user: {{exec: {exec}, token: "));
    assert_ne!(good, bad);
    let apply = |secret: &str| -> Result<()> {
        fs::write(&file, secret)?;
        stage.west.apply(&file)
    };
    apply(&bad)?;
    let refused = eventually(TIMEOUT, "the refusal", || {
        let status = stage.status().ok()?;
        status["error"].as_str().map(str::to_owned)
    })?;
    assert!(
        refused.contains("users[].user.exec is not allowed"),
        "{refused}"
    );
    stage.wait_for(None)?;
    assert!(!fs::exists(&ran)?, "it ran the program");

    // A good one is followed, and stays in use if the next one is bad.
    apply(&good)?;
    stage.wait_for(Some(FROM_EAST))?;
    assert_eq!(stage.status()?["trustDomain"], WEST, "by default");
    apply(&bad)?;
    eventually(TIMEOUT, "the refusal", || {
        stage.status().ok()?["error"].as_str().map(drop)
    })?;
    assert_eq!(stage.ask(SERVICE)?.as_deref(), Some(FROM_EAST));
    assert!(!fs::exists(&ran)?, "it ran the program");
    Ok(())
}

/// Waits until an exchange is reset.
fn ends(chat: App) -> Result<()> {
    let failed = chat.failure(TIMEOUT)?;
    assert_eq!(failed["errno"], "ECONNRESET", "{failed}");
    Ok(())
}

#[test]
fn connections_stay_only_if_they_would_be_made_now() -> Result<()> {
    let test = "connections_stay_only_if_they_would_be_made_now";
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED {test}: {why}");
        return Ok(());
    }
    let stage = Stage::start(EAST)?;
    let _servers = [stage.echo_server("client")?, stage.echo_server("web-east")?];
    let at = |pod: &str| -> SocketAddr { stage.mesh.pod(pod).at(7) };
    let (client, server) = (at("client").to_string(), at("web-east").to_string());
    let east = stage.east.remote_secret("east")?;
    stage.west.apply(&east)?;
    stage.east.apply(&stage.west.remote_secret("west")?)?;

    // Of a cluster that is removed, those to its pods end: there is no way to them now.
    let to_pod = stage.chat("client", &server)?;
    let to_service = stage.chat("client", ECHO_SERVICE)?;
    let from_east = stage.chat("web-east", &client)?;
    stage.west.delete(SECRET)?;
    ends(to_pod)?;
    ends(to_service)?;
    for destination in [server.as_str(), ECHO_SERVICE] {
        stage.a.wait_for_access("the end", TIMEOUT, |line| {
            line["destination"] == destination
                && line["result"] == "reset"
                && line["reason"] == "the remote cluster east was removed"
        })?;
    }
    // Those from its pods stay, because a new one is admitted, too: by its certificate.
    assert!(stage.echoes("web-east", &client)?);
    let rounds = || from_east.events_of("round").len();
    let before = rounds();
    eventually(TIMEOUT, "the exchange to continue", || {
        (rounds() > before + 1).then_some(())
    })?;

    // Without its trust domain's federation entry, none would be. `remoteClusters` may name the trust domain still.
    let federate = |entries: &Value| {
        stage
            .a
            .edit_config(|config| config["federation"] = entries.clone())
    };
    federate(&json!([]))?;
    ends(from_east)?;
    assert!(!stage.echoes("web-east", &client)?);

    // The daemon names a remote cluster without such an entry, until it has one.
    stage.west.apply(&east)?;
    stage.wait_for_message(NOT_TRUSTED)?;
    assert_eq!(stage.status()?["trusted"], false);
    let metrics = stage.a.metrics()?;
    let trusted = "auth_daemon_remote_cluster_trusted{cluster=\"east\"} 0\n";
    assert!(metrics.contains(trusted), "{metrics}");
    let bundle = stage.mesh.outside().folder().join(EAST);
    federate(&json!([{"trustDomain": EAST, "bundleFile": bundle}]))?;
    stage.wait_for_message("remote cluster's trust domain is trusted again")?;
    assert_eq!(stage.status()?["trusted"], true);
    stage.wait_for(Some(FROM_EAST))?;
    // The entry is removed while the cluster is one.
    let start = stage.a.log_position();
    federate(&json!([]))?;
    stage
        .a
        .wait_for_log_after(start, NOT_TRUSTED, TIMEOUT, says(NOT_TRUSTED))?;
    stage.wait_for(None)
}
