//! Steps about kinds of services and of pods: NodePort, StatefulSet with a headless service, init containers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mesh_tests::{Context, PodNetwork, Result, eventually_ok, slowdown};
use serde_json::{Value, json};

use crate::stage::{
    APPS, PATIENCE, Stage, account, address, container, ensure, idle_pod, is_ready,
};
use crate::starts::starts;
use crate::traffic::{
    MARKER, PORT, has_refused_plaintext, identity, log_has, log_has_tunnel, server_pod,
    service_address, who,
};

/// A NodePort service of `web-2`, on node2, with this `externalTrafficPolicy`.
fn node_port(name: &str, policy: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": APPS},
        "spec": {
            "type": "NodePort", "externalTrafficPolicy": policy,
            "selector": {"app": "web-2"}, "ports": [{"port": 80, "targetPort": "http"}],
        },
    })
}

/// A port at an address of a node.
fn at_node(stage: &Stage, node: &str, port: u16) -> SocketAddr {
    (stage.cluster.node(node).node().ipv4(), port).into()
}

/// The NodePort of a service.
fn port_of(stage: &Stage, service: &str) -> Result<u16> {
    let service = stage.get(&format!("service -n {APPS} {service}"))?;
    let port = service["spec"]["ports"][0]["nodePort"].as_u64();
    Ok(port.context("no NodePort")?.try_into()?)
}

/// The answer to a host outside the mesh.
fn from_outside(stage: &Stage, to: SocketAddr) -> Result<String> {
    let url = format!("http://{to}/cgi-bin/who");
    let curl = ["-sSf", "--max-time", "10", &url];
    let outside = stage.cluster.mesh().outside();
    Ok(outside.run("curl", curl)?.ok()?.stdout)
}

/// Requests from a host outside the mesh, over NodePorts of a server on node2.
pub(crate) fn node_ports(stage: &Stage) -> Result<()> {
    stage.apply(&[
        node_port("port-cluster", "Cluster"),
        node_port("port-local", "Local"),
    ])?;
    // Whether kube-proxy keeps the caller's address or translates it to a node's, plaintext from outside the mesh is refused.
    let node = |name: &str| IpAddr::from(stage.cluster.node(name).node().ipv4());
    let bridge = bridge(&stage.pod(APPS, "app=web-2")?)?;
    let outside = IpAddr::from(stage.cluster.mesh().outside_ipv4());
    for (service, at, callers) in [
        ("port-cluster", "node2", vec![node("node2"), bridge]),
        ("port-cluster", "node1", vec![node("node1")]),
        ("port-local", "node2", vec![outside]),
    ] {
        let to = at_node(stage, at, port_of(stage, service)?);
        is_refused_outside(stage, to, &callers)?;
    }
    stage
        .kubectl(&format!("delete service -n {APPS} port-cluster port-local"))
        .map(drop)
}

/// The address of a pod's node on the bridge of the node's pods.
fn bridge(pod: &Value) -> Result<IpAddr> {
    let address: Ipv4Addr = address(pod).parse()?;
    let [a, b, c, _] = address.octets();
    Ok([a, b, c, 1].into())
}

/// Waits until a server on node2 refuses a host outside the mesh that dials `to` and that it sees as one of `callers`.
fn is_refused_outside(stage: &Stage, to: SocketAddr, callers: &[IpAddr]) -> Result<()> {
    // kube-proxy may not know the port yet, which is refused too, but leaves no line.
    eventually_ok(PATIENCE, "a refusal by the pod", || {
        let answer = from_outside(stage, to);
        ensure(answer.is_err(), || format!("{to}: {answer:?}"))?;
        ensure(has_refused_plaintext(stage, "node2", callers)?, || {
            format!("no line of a refusal of {callers:?}")
        })
    })
}

/// Requests from pods of the mesh, over a NodePort of `web-2` and a host port of another pod, both on node2: at the
/// address of the server's node and, for the NodePort, at that of the client's own.
pub(crate) fn exposed_ports(stage: &Stage) -> Result<()> {
    let mut spec = server_pod("exposed", Some("node2"));
    spec["containers"][0]["ports"][0]["hostPort"] = json!(HOST_PORT);
    let exposed = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "exposed", "namespace": APPS, "labels": {"app": "exposed"}}, "spec": spec,
    });
    stage.apply(&[
        account("exposed"),
        exposed,
        node_port("port-cluster", "Cluster"),
    ])?;
    stage.becomes("pod/exposed", "Ready")?;
    let node_port = port_of(stage, "port-cluster")?;
    let capture = stage.cluster.wire().capture()?;
    for (client, node, to, server) in [
        (
            "client-1",
            "node1",
            at_node(stage, "node2", node_port),
            "web-2",
        ),
        (
            "client-1",
            "node1",
            at_node(stage, "node1", node_port),
            "web-2",
        ),
        (
            "client-1",
            "node1",
            at_node(stage, "node2", HOST_PORT),
            "exposed",
        ),
        (
            "client-2",
            "node2",
            at_node(stage, "node2", node_port),
            "web-2",
        ),
        (
            "client-2",
            "node2",
            at_node(stage, "node1", node_port),
            "web-2",
        ),
        (
            "client-2",
            "node2",
            at_node(stage, "node2", HOST_PORT),
            "exposed",
        ),
    ] {
        // Dialled before the daemon knows of the port, it is a port of a node, at which a STRICT pod refuses.
        eventually_ok(PATIENCE, "an answer", || {
            let answer = stage.curl(client, &format!("http://{to}/cgi-bin/who"))?;
            ensure(answer.contains(&format!("asked {server}")), || {
                format!("{client} to {to}: {answer}")
            })
        })?;
        // On a bridge, TLS proves who answers, also on one node.
        let is_routed = stage.cluster.network() == PodNetwork::Routed;
        let path = if node == "node2" && is_routed {
            "same-node"
        } else {
            "tunnel"
        };
        log_has(stage, node, |line| {
            line["destination"] == to.to_string()
                && line["path"] == path
                && line["server_identity"] == identity(server)
                && line["result"] == "ok"
        })?;
    }
    let recording = capture.stop()?;
    ensure(!recording.contains(MARKER.as_bytes()), || {
        format!("{MARKER} is readable on the wire")
    })?;
    // The plugin that forwards host ports keeps the caller's address.
    let outside = IpAddr::from(stage.cluster.mesh().outside_ipv4());
    is_refused_outside(stage, at_node(stage, "node2", HOST_PORT), &[outside])?;
    stage
        .kubectl(&format!(
            "delete -n {APPS} service/port-cluster pod/exposed serviceaccount/exposed --now --wait=false"
        ))
        .map(drop)
}

const HOST_PORT: u16 = 9090;

/// Services that lead to `web-2` without a selector of their own, or at an address of a load balancer.
pub(crate) fn other_services(stage: &Stage) -> Result<()> {
    let service = |name: &str, spec: Value| {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": APPS}, "spec": spec,
        })
    };
    let ports = json!([{"name": "http", "port": 80, "targetPort": PORT}]);
    let web = stage.pod(APPS, "app=web-2")?;
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": "by-hand-1", "namespace": APPS,
            "labels": {"kubernetes.io/service-name": "by-hand"},
        },
        "addressType": "IPv4", "ports": [{"name": "http", "port": PORT}],
        "endpoints": [{"addresses": [address(&web)]}],
    });
    let balanced = json!({
        "type": "LoadBalancer", "ports": ports, "selector": {"app": "web-2"},
    });
    let external = json!({
        "type": "ExternalName", "externalName": format!("web-2.{APPS}.svc.cluster.local"),
    });
    stage.apply(&[
        service("by-hand", json!({"ports": ports})),
        slice,
        service("balanced", balanced),
        service("external", external),
    ])?;
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": BALANCER}]}}}).to_string();
    let patch = [
        "patch",
        "service",
        "-n",
        APPS,
        "balanced",
        "--subresource=status",
        "--type=merge",
        "-p",
        &status,
    ];
    stage.cluster.kubectl(patch)?.ok()?;
    let by_hand = format!("{}:80", service_address(stage, "by-hand")?);
    // Where the cluster's DNS leads a client of the ExternalName.
    let external = format!("{}:80", service_address(stage, "web-2")?);
    let capture = stage.cluster.wire().capture()?;
    for (to, name, service) in [
        (by_hand, "by-hand", "by-hand"),
        (format!("{BALANCER}:80"), "balanced", "balanced"),
        (external, "external", "web-2"),
    ] {
        eventually_ok(PATIENCE, "an answer", || {
            let connect = format!("{name}:80:{to}");
            let url = format!("http://{name}/cgi-bin/who");
            let curl = [
                "curl",
                "-sSf",
                "--max-time",
                "15",
                "--connect-to",
                &connect,
                &url,
            ];
            let answer = stage.exec("client-1", &curl)?.ok()?.stdout;
            ensure(answer.contains("asked web-2"), || answer.clone())
        })
        .with_context(|| name.to_owned())?;
        log_has(stage, "node1", |line| {
            line["destination"] == to
                && line["service"] == format!("{APPS}/{service}")
                && line["path"] == "tunnel"
                && line["server_identity"] == identity("web-2")
                && line["result"] == "ok"
        })?;
    }
    let recording = capture.stop()?;
    ensure(!recording.contains(MARKER.as_bytes()), || {
        format!("{MARKER} is readable on the wire")
    })?;
    stage
        .kubectl(&format!(
            "delete -n {APPS} service/by-hand service/balanced service/external endpointslice/by-hand-1"
        ))
        .map(drop)
}

/// An address that nothing has.
const BALANCER: &str = "198.51.100.7";

/// A StatefulSet's pods are reached by their own addresses, also after one of them is created again.
pub(crate) fn stateful_set(stage: &Stage) -> Result<()> {
    let labels = json!({"app": "db"});
    let set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet",
        "metadata": {"name": "db", "namespace": APPS},
        "spec": {
            "serviceName": "db", "replicas": 2, "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": server_pod("db", Some("node2"))},
        },
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "db", "namespace": APPS},
        "spec": {
            "clusterIP": "None", "selector": labels, "ports": [{"port": PORT, "targetPort": "http"}],
        },
    });
    stage.apply(&[account("db"), service, set])?;
    stage.rolled_out(APPS, "statefulset/db")?;
    let reach = |pod: &str| -> Result<Value> {
        let state = stage.get(&format!("pod -n {APPS} {pod}"))?;
        let url = format!("http://{}:{PORT}/cgi-bin/who", address(&state));
        // The client's daemon may not know the pod yet.
        eventually_ok(PATIENCE, "an answer", || {
            let answer = stage.curl("client-1", &url)?;
            ensure(answer.contains(&format!("asked {pod}")), || answer.clone())
        })?;
        let endpoint = format!("{}:", address(&state));
        log_has_tunnel(stage, "node1", "client", "db", Some(&endpoint))?;
        Ok(state)
    };
    let first = reach("db-0")?;
    reach("db-1")?;
    stage.kubectl(&format!("delete pod -n {APPS} db-0 --now"))?;
    // The StatefulSet's status may be older than the deletion.
    eventually_ok(PATIENCE, "another pod of this name", || {
        let second = stage.get(&format!("pod -n {APPS} db-0"))?;
        let is_other = first["metadata"]["uid"] != second["metadata"]["uid"];
        ensure(is_other && is_ready(&second), || {
            second["status"].to_string()
        })
    })?;
    reach("db-0")?;
    stage
        .kubectl(&format!(
            "delete -n {APPS} statefulset/db service/db serviceaccount/db"
        ))
        .map(drop)
}

/// Pods whose init container makes one request, without a retry. The runtime waits for the daemon before it starts them, but for
/// a second at most: where a busy machine took longer for one, another is started instead.
pub(crate) fn first_connects(stage: &Stage) -> Result<()> {
    let url = who(stage, "web-2")?;
    let capture = stage.cluster.wire().capture()?;
    let (mut started, mut in_time) = (0, 0);
    while in_time < FIRST_CONNECTS {
        ensure(started < 10 * FIRST_CONNECTS, || {
            format!("the daemon was in time for {in_time} of {started} pods")
        })?;
        let numbers = started + 1..=started + FIRST_CONNECTS - in_time;
        let names: Vec<String> = numbers.map(|n| format!("first-{n}")).collect();
        let pods: Vec<_> = names.iter().map(|name| first_pod(name, &url)).collect();
        stage.apply(&pods)?;
        started += names.len();
        for name in &names {
            in_time += usize::from(connects_at_first(stage, name)?);
        }
    }
    let recording = capture.stop()?;
    ensure(!recording.contains(MARKER.as_bytes()), || {
        format!("{MARKER} is readable on the wire")
    })?;
    stage
        .kubectl(&format!("delete pods -n {APPS} -l app=first --now"))
        .map(drop)
}

fn first_pod(name: &str, url: &str) -> Value {
    let mut pod = idle_pod(name, "node1", "client");
    let script = format!("exec curl -sSf --max-time {} {url}", 15 * slowdown());
    let mut first = container(&script);
    first["name"] = json!("first");
    pod["spec"]["initContainers"] = json!([first]);
    // A failed request fails the pod.
    pod["spec"]["restartPolicy"] = json!("Never");
    pod["metadata"]["labels"] = json!({"app": "first"});
    pod
}

/// Checks the first connection of such a pod. Returns false if it is not as it should be, and the runtime may have started the
/// pod without the daemon's answer.
fn connects_at_first(stage: &Stage, name: &str) -> Result<bool> {
    let pod = eventually_ok(PATIENCE, "the end of the init container", || {
        let pod = stage.get(&format!("pod -n {APPS} {name}"))?;
        let phase = pod["status"]["phase"].as_str().unwrap_or_default();
        ensure(["Running", "Failed"].contains(&phase), || phase.to_owned())?;
        Ok(pod)
    })?;
    let stdout = stage.kubectl(&format!("logs -n {APPS} {name} -c first"))?;
    let is_answered = pod["status"]["phase"] == "Running" && stdout.contains(MARKER);
    let as_it_should = ensure(is_answered, || format!("{name}: {stdout}{}", pod["status"]))
        .and_then(|()| enrolled_first(stage, "node1", name));
    let Err(why) = as_it_should else {
        return Ok(true);
    };
    let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
    let starts = starts(stage.cluster.node("node1"))?;
    let start = starts.get(uid).context("no start in the runtime's log")?;
    if start.took() < LONGEST_WAIT {
        return Err(why);
    }
    println!("    {name} took {:.0} ms to start: {why:#}", start.took());
    Ok(false)
}

/// The container runtime waited for the daemon: the pod was enrolled before it had a socket.
fn enrolled_first(stage: &Stage, node: &str, name: &str) -> Result<()> {
    let log = stage.daemon_log(node)?;
    let pod = json!(format!("{APPS}/{name}"));
    let enrolled = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|line| line["message"] == "pod enrolled" && line["pod"] == pod)
        .with_context(|| format!("{pod} was not enrolled on {node}"))?;
    ensure(enrolled.get("unserved_microseconds").is_none(), || {
        format!("{pod} had a socket before it was enrolled: {enrolled}")
    })
}

const FIRST_CONNECTS: usize = 10;
/// How long the runtime waits for the daemon, in milliseconds. For a pod that took less to start, the daemon answered
/// in time.
const LONGEST_WAIT: f64 = 1000.0;
