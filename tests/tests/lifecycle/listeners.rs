//! A listener of the daemon that is closed from outside: a pod with CAP_NET_ADMIN can destroy sockets of its own netns.
//! The kernel finds only the one for tunnels, because the inbound program leads every lookup there. With a
//! container's default capabilities, a pod reaches no socket of the daemon.

use std::net::SocketAddr;

use mesh_tests::{App, Place, Pod, TIMEOUT, eventually, eventually_ok, pod_app};
use serde_json::Value;

use crate::common::lifecycle_pair::{MARKER, daemons, pair, pod_status};

/// The port of the listener for tunnels.
const PORT: u16 = 15008;

/// Destroys the sockets that listen on `port` in the netns of `pod`. Returns whether there was one.
fn destroy(pod: &Pod, port: u16) -> bool {
    let filter = format!("sport = :{port}");
    let destroyed = pod.run("ss", ["-HKltn", &filter]).unwrap().ok().unwrap();
    !destroyed.stdout.trim().is_empty()
}

fn is_answered(from: &Place, to: SocketAddr) -> bool {
    let command = format!("connect --to {to} --timeout 2000 --send {MARKER} --shutdown --read");
    let finished = from.app(&command).unwrap().finish(TIMEOUT).unwrap();
    let last = finished.json_lines().pop().unwrap();
    last["text"] == MARKER
}

#[test]
fn a_listener_that_is_destroyed_is_opened_again() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let (_a, b) = daemons(&mesh);
    let _echo = web.app("echo-server --port 8080").unwrap();
    let ways = [web.at(8080), web.at6(8080)];
    let answered = || {
        ways.iter()
            .all(|to| is_answered(&client, *to))
            .then_some(())
    };
    eventually(TIMEOUT, "an answer", answered).unwrap();
    // What was accepted before continues.
    let mut chat = client.app(&format!("chat --to {}", ways[0])).unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let start = b.log_position();
    assert!(destroy(&web, PORT), "nothing listened");
    b.wait_for_log_after(start, "the listener", TIMEOUT, |line| {
        line["message"] == "a listener is open again" && line["pod"] == "default/web"
    })
    .unwrap();
    eventually(TIMEOUT, "an answer again", answered).unwrap();
    let status = pod_status(&b, "default/web").unwrap();
    let reason = status.reason.unwrap_or_default();
    assert_eq!((status.enrolled, reason), (true, String::new()));
    chat.event("round", TIMEOUT).unwrap();
    chat.event("round", TIMEOUT).unwrap();
}

/// What containerd and CRI-O give a container (as `setpriv` names them).
const DEFAULT_CAPABILITIES: &str = "-all,+audit_write,+chown,+dac_override,+fowner,+fsetid,+kill,+mknod,+net_bind_service,\
                                    +net_raw,+setfcap,+setgid,+setpcap,+setuid,+sys_chroot";

/// The pod shares the daemon's pid namespace, as one with `hostPID` does. Others cannot even name the daemon's process.
#[test]
fn a_pod_with_default_capabilities_reaches_no_descriptor_of_the_daemon() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let (_a, b) = daemons(&mesh);
    let _echo = web.app("echo-server --port 8080").unwrap();
    let answered = || is_answered(&client, web.at(8080)).then_some(());
    eventually(TIMEOUT, "an answer", answered).unwrap();
    let (program, pid) = (pod_app().unwrap(), b.pid().to_string());
    let steal = [program.to_str().unwrap(), "steal", "--pid", &pid];
    let limited = ["--bounding-set", DEFAULT_CAPABILITIES];

    let refused = web.run("setpriv", [&limited[..], &steal[..]].concat());
    let refused = refused.unwrap().ok().unwrap().json_lines().pop().unwrap();
    for (way, errno) in [
        ("link", "EACCES"),
        ("memory", "EACCES"),
        ("duplicate", "EPERM"),
    ] {
        assert_eq!(refused[way], errno, "{way}: {refused}");
    }
    // This takes the capabilities of root on the node.
    let root = web.run(steal[0], &steal[1..]).unwrap().ok().unwrap();
    let root = root.json_lines().pop().unwrap();
    for way in ["link", "memory", "duplicate"] {
        assert_eq!(root[way], "done", "{way}: {root}");
    }

    // Nor does it destroy the daemon's sockets in its own netns.
    let filter = format!("sport = :{PORT}");
    let destroy = [&limited[..], &["ss", "-HKltn", &filter][..]].concat();
    let destroyed = web.run("setpriv", destroy).unwrap();
    assert!(destroyed.stdout.trim().is_empty(), "{destroyed:?}");
    assert!(is_answered(&client, web.at(8080)));
    let opened = |line: &Value| line["message"] == "a listener is open again";
    assert!(!b.logs().iter().any(opened));
}

#[test]
fn a_pod_that_takes_the_daemons_port_is_refused_until_it_releases_it() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let (_a, b) = daemons(&mesh);
    let _echo = web.app("echo-server --port 8080").unwrap();
    let to = web.at(8080);
    let answered = || is_answered(&client, to).then_some(());
    eventually(TIMEOUT, "an answer", answered).unwrap();
    // The daemon may be faster.
    let thief: App = eventually_ok(TIMEOUT, "the port to be taken", || {
        destroy(&web, PORT);
        web.app(&format!("echo-server --port {PORT}"))?.listening()
    })
    .unwrap();
    let reason = eventually(TIMEOUT, "the pod to be refused", || {
        let status = pod_status(&b, "default/web")?;
        (!status.enrolled).then_some(status.reason?)
    })
    .unwrap();
    assert!(
        reason.contains(&format!("cannot listen on [::]:{PORT}")),
        "{reason}"
    );
    // An open tunnel would carry a connection to the other address.
    assert!(!is_answered(&client, web.at6(8080)));
    // The pod that took the port does not get what is meant for the daemon either.
    assert_eq!(thief.events_of("accepted"), Vec::<Value>::new());
    drop(thief);
    eventually(TIMEOUT, "an answer again", answered).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
}
