//! Nodes and pods of network namespaces, for unit tests of links and routes.

use std::{os::fd::AsRawFd, process::Command};

use super::{Netns, lacks_root};

/// A node and a pod without interfaces. `None` if `test` is skipped, because it lacks root's rights.
pub(crate) fn node_and_pod(test: &str) -> Option<(Netns, Netns)> {
    if lacks_root(test) {
        return None;
    }
    Some((Netns::create().unwrap(), Netns::create().unwrap()))
}

/// Runs `ip` in `netns`. `POD` stands for `pod`, as a name of a network namespace.
pub(crate) fn ip(netns: &Netns, pod: &Netns, arguments: &str) {
    assert!(try_ip(netns, pod, arguments), "ip {arguments}");
}

/// Like [`ip`], for a kind of device that the kernel may not know. Returns whether it does.
pub(crate) fn try_ip(netns: &Netns, pod: &Netns, arguments: &str) -> bool {
    let file = pod.try_clone_file().unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let path = arguments.replace("POD", &path);
    let output = netns.enter(|| Command::new("ip").args(path.split(' ')).output());
    let output = output.unwrap().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let is_unknown = error.contains("Unknown device type") || error.contains("not supported");
    assert!(
        output.status.success() || is_unknown,
        "ip {arguments}: {error}"
    );
    if is_unknown {
        println!("SKIPPED ip {arguments}: {error}");
    }
    !is_unknown
}
