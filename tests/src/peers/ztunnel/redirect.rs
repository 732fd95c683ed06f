//! Redirects a pod's connections to ztunnel, by the rules that istio-cni writes.

use anyhow::Result;

use super::super::load_rules;
use crate::place::Place;

/// Installs the rules and the routes that they need in the pod's namespace, with which they are removed. Replaces those
/// of an earlier ztunnel.
///
/// # Errors
/// If `nft` or `ip` rejects them.
pub(super) fn install(pod: &Place, ipv6: bool) -> Result<()> {
    load_rules(pod, &rules())?;
    let marked = format!("{ANSWERS:#x}/{MASK:#x}");
    for (family, all) in [("-4", "0.0.0.0/0"), ("-6", "::/0")] {
        if family == "-6" && !ipv6 {
            continue;
        }
        let rule = format!("{family} rule add fwmark {marked} lookup {TABLE} pref 32764");
        let added = pod.run("ip", rule.split(' '))?;
        if !added.stderr.contains("File exists") {
            added.ok()?;
        }
        let route = format!("{family} route replace local {all} dev lo table {TABLE}");
        pod.run("ip", route.split(' '))?.ok()?;
    }
    Ok(())
}

/// Redirects traffic that is not ztunnel's own (which carries a mark) to ztunnel: the pod's connections to other hosts,
/// and connections from other hosts to the pod that are not HBONE. ztunnel connects to the pod's application from the
/// caller's address, so the application's replies are routed back by the connection mark.
fn rules() -> String {
    format!(
        "table inet ztunnel {{}}\n\
         delete table inet ztunnel\n\
         table inet ztunnel {{\n\
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
         ip6 daddr != ::1 tcp dport != {HBONE} redirect to :{INBOUND}\n\
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

/// ztunnel's port for what the pod sends.
pub(super) const OUTBOUND: u16 = 15001;
/// ztunnel's port for plaintext to the pod.
pub(super) const INBOUND: u16 = 15006;
/// ztunnel's port for other ztunnels.
pub(super) const HBONE: u16 = 15008;
/// The mark of ztunnel's own packets.
const OWN: u32 = 0x539;
/// The mark of connections to the pod's application, and of the application's replies.
const ANSWERS: u32 = 0x111;
/// The mask of the marks.
const MASK: u32 = 0xfff;
/// The routing table for the replies.
const TABLE: u32 = 100;
