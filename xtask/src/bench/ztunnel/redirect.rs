//! Leading a pod's connections to ztunnel, by the rules that istio-cni writes.

use anyhow::Result;
use mesh_tests::Place;

use super::super::peer;

/// Installs the rules and the route that they need in the pod's namespace. They go with it.
///
/// # Errors
/// When `nft` or `ip` refuses them.
pub(super) fn install(pod: &Place) -> Result<()> {
    peer::load(pod, &rules())?;
    let marked = format!("{ANSWERS:#x}/{MASK:#x}");
    for arguments in [
        format!("rule add fwmark {marked} lookup {TABLE} pref 32764"),
        format!("route add local 0.0.0.0/0 dev lo table {TABLE}"),
    ] {
        pod.run("ip", arguments.split(' '))?.ok()?;
    }
    Ok(())
}

/// What is not ztunnel's own, which it marks, goes to it: the pod's connections to other hosts, and other hosts' to the
/// pod that are not HBONE. To the pod's app ztunnel shows the caller's address, so the app's answers are brought back by
/// the connection's mark.
fn rules() -> String {
    format!(
        "table ip ztunnel {{\n\
         chain calls {{\n\
         type filter hook prerouting priority mangle; policy accept;\n\
         meta mark & {MASK:#x} == {OWN:#x} ct mark set {ANSWERS:#x}\n\
         }}\n\
         chain answers {{\n\
         type route hook output priority mangle; policy accept;\n\
         ct mark & {MASK:#x} == {ANSWERS:#x} meta mark set ct mark\n\
         }}\n\
         chain prerouting {{\n\
         type nat hook prerouting priority dstnat; policy accept;\n\
         meta mark & {MASK:#x} == {OWN:#x} return\n\
         ip daddr != 127.0.0.1 tcp dport != {HBONE} redirect to :{INBOUND}\n\
         }}\n\
         chain output {{\n\
         type nat hook output priority -100; policy accept;\n\
         meta mark & {MASK:#x} == {{ {OWN:#x}, {ANSWERS:#x} }} return\n\
         oifname lo return\n\
         meta l4proto tcp redirect to :{OUTBOUND}\n\
         }}\n\
         }}\n"
    )
}

/// Its port for what the pod sends.
pub(super) const OUTBOUND: u16 = 15001;
/// Its port for what is sent to the pod in the clear.
pub(super) const INBOUND: u16 = 15006;
/// Its port for other ztunnels.
pub(super) const HBONE: u16 = 15008;
/// On ztunnel's own packets.
const OWN: u32 = 0x539;
/// On connections to the pod's app, and on the app's answers.
const ANSWERS: u32 = 0x111;
/// Of the marks.
const MASK: u32 = 0xfff;
/// The routing table of the answers.
const TABLE: u32 = 100;
