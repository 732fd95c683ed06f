//! Redirects a pod's connections to its sidecar, by the rules that Istio writes.

use anyhow::Result;
use mesh_tests::Place;
use mesh_tests::peers::load_rules;

use super::config::{INBOUND, OUTBOUND};

/// Installs the rules in the pod's namespace, with which they are removed.
///
/// # Errors
/// If `nft` rejects them.
pub(super) fn install(pod: &Place) -> Result<()> {
    load_rules(pod, &rules())
}

/// Redirects all TCP from other hosts to the inbound listener, and all TCP that the pod sends to other hosts to the
/// outbound listener. Traffic of the sidecar itself, which has a group of its own, passes.
fn rules() -> String {
    format!(
        "table ip sidecar {{\n\
         chain prerouting {{\n\
         type nat hook prerouting priority dstnat; policy accept;\n\
         meta l4proto tcp redirect to :{INBOUND}\n\
         }}\n\
         chain output {{\n\
         type nat hook output priority -100; policy accept;\n\
         oifname lo return\n\
         meta skgid {GROUP} return\n\
         meta l4proto tcp redirect to :{OUTBOUND}\n\
         }}\n\
         }}\n"
    )
}

/// The group that sidecars run with, as in Istio.
pub(super) const GROUP: u32 = 1337;
