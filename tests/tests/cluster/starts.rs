//! How long the container runtime takes to start pods, from its log.

use std::collections::HashMap;

use mesh_tests::{ClusterNode, Result};

use crate::load::second_of_day;

/// A call of `RunPodSandbox` that has returned: its begin and its end, in seconds since midnight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) begin: f64,
    pub(crate) end: f64,
}

impl Start {
    /// In milliseconds.
    pub(crate) fn took(&self) -> f64 {
        (self.end - self.begin) * 1000.0
    }
}

/// The pods that the runtime of a node has started, by UID. That of a static pod is its hash.
pub(crate) fn starts(node: &ClusterNode) -> Result<HashMap<String, Start>> {
    let (mut begun, mut starts) = (HashMap::new(), HashMap::new());
    for line in node.program_log("containerd")?.lines() {
        let Some((at, uid)) = line.split_once(CALL).and_then(|(before, call)| {
            let time = before.split_once("time=\"")?.1.split('"').next()?;
            Some((second_of_day(time)?, uid(call)?))
        }) else {
            continue;
        };
        if line.contains("returns sandbox id") {
            if let Some(begin) = begun.remove(&uid) {
                starts.insert(uid, Start { begin, end: at });
            }
        } else {
            begun.insert(uid, at);
        }
    }
    Ok(starts)
}

const CALL: &str = "RunPodSandbox for ";

/// The UID in the text of a pod's metadata.
fn uid(metadata: &str) -> Option<String> {
    let (_, rest) = metadata.split_once("uid:")?;
    let rest = rest.trim_start_matches(['\\', '"']);
    let end = rest.find(|c: char| !c.is_ascii_hexdigit() && c != '-')?;
    Some(rest[..end].to_owned())
}

#[test]
fn starts_are_read_from_the_runtimes_log() {
    let call = r#"RunPodSandbox for name:\"a\"  uid:\"0f-1\"  namespace:\"b\""#;
    assert_eq!(uid(call).as_deref(), Some("0f-1"));
}
