//! The step about packet filters between pods.

use mesh_tests::{Firewall, Result, eventually_ok};

use crate::stage::{APPS, PATIENCE, Stage, addresses, ensure, name};
use crate::traffic::{MARKER, PORT, who};

/// A NetworkPolicy that admits one pod to another's port, as the rules that network plugins make of it on the server's node.
/// Tunnels keep the pods' addresses and the port, so the rules mean the same for them.
pub(crate) fn names_pods_and_ports(stage: &Stage) -> Result<()> {
    let client = addresses(&stage.get(&format!("pod -n {APPS} client-1"))?)?;
    let server = addresses(&stage.pod(APPS, "app=web-2")?)?;
    let mut rules = String::from(
        "counter allowed {}\ncounter dropped {}\nchain forward {\n  type filter hook forward priority 0; policy accept;\n",
    );
    for (client, server) in client.iter().zip(&server) {
        let family = if server.is_ipv4() { "ip" } else { "ip6" };
        rules += &format!(
            "  {family} saddr {client} {family} daddr {server} tcp dport {PORT} counter name allowed accept\n  \
             {family} daddr {server} meta l4proto tcp counter name dropped drop\n"
        );
    }
    rules += "}\n";
    let node = stage.cluster.node("node2").node();
    let firewall = Firewall::install(node, &rules)?;
    let url = who(stage, "web-2")?;
    let answer = stage.curl("client-1", &url)?;
    ensure(answer.contains(MARKER), || answer.clone())?;
    // A tunnel of another pod does not pass.
    let other = stage.pod(APPS, "app=web-1")?;
    let other = name(&other);
    eventually_ok(PATIENCE, "a packet that is dropped", || {
        let refused = stage.exec(other, &["curl", "-sS", "--max-time", "1", &url])?;
        assert!(!refused.status.success(), "answered: {}", refused.stdout);
        // The daemon may take longer than curl waits before it opens a tunnel.
        ensure(firewall.packets("dropped")? > 0, || "none".to_owned())
    })?;
    ensure(firewall.packets("allowed")? > 0, || {
        "no packet is allowed".to_owned()
    })?;
    drop(firewall);
    eventually_ok(PATIENCE, "an answer to the other pod", || {
        let answer = stage.curl(other, &url)?;
        ensure(answer.contains(MARKER), || answer.clone())
    })
}
