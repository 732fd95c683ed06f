//! Pods whose namespace no manifest names are found by their UID, in whatever container they run.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_tests::{DaemonOptions, Mesh, Pod, PodSpec, Process, TIMEOUT, eventually, eventually_ok};
use serde_json::Value;

use crate::common::by_uid::{daemons, enrolments, netns, pair, pause, sleep};
use crate::common::lifecycle_pair::{self, assert_reset, call, echoes, pod_status, ways};

#[test]
fn a_pod_is_found_by_its_uid() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let (a, b) = daemons(&mesh);
    for (daemon, name) in [(&a, "default/client"), (&b, "default/web")] {
        let status = pod_status(daemon, name).unwrap();
        assert!(!status.enrolled);
        let reason = status.reason.unwrap();
        assert!(reason.contains(name), "{reason}");
        assert!(
            reason.contains("no process"),
            "every pod begins so: {reason}"
        );
        let errors: Vec<_> = daemon
            .logs()
            .into_iter()
            .filter(|line| line["level"] == "ERROR")
            .collect();
        assert!(errors.is_empty(), "{errors:?}");
    }

    let _sandboxes = [pause(&client), pause(&web)];
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    let status = pod_status(&b, "default/web").unwrap();
    assert_eq!(status.netns, Some(netns(&web)));
    let app = web.container("c1").unwrap();
    let _echo = app
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let capture = mesh.wire().capture().unwrap();
    for to in ways(&web) {
        echoes(&client.container("c1").unwrap(), to);
    }
    let recording = capture.stop().unwrap();
    assert!(!recording.contains(lifecycle_pair::MARKER.as_bytes()));
    b.wait_for_access("the client's identity", TIMEOUT, |line| {
        line["client_identity"] == "spiffe://cluster.local/ns/default/sa/client"
            && line["client"]
                .as_str()
                .unwrap()
                .starts_with(&client.ipv4().to_string())
    })
    .unwrap();
    assert_reset(&call(mesh.outside(), web.at(8080)));
}

#[test]
fn a_uid_that_no_cgroup_can_have_is_reported() {
    let mesh = pair();
    let (_a, b) = daemons(&mesh);
    let change = |pod: &mut Value| pod["metadata"]["uid"] = "web-1".into();
    mesh.manifests()
        .edit("Pod", "default", "web", change)
        .unwrap();
    b.wait_for_log("what is wrong", TIMEOUT, |line| {
        let message = line["message"].as_str().unwrap_or_default();
        line["level"] == "ERROR"
            && ["default/web", "metadata.uid", "web-1"]
                .iter()
                .all(|part| message.contains(part))
    })
    .unwrap();
}

#[test]
fn restarted_containers_keep_it() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _sandboxes = (pause(&client), pause(&web));
    let (a, b) = daemons(&mesh);
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    for restart in 0..3 {
        let app = web.container(&format!("c{restart}")).unwrap();
        let _echo = app
            .app("echo-server --port 8080")
            .unwrap()
            .listening()
            .unwrap();
        echoes(&client, web.at(8080));
        if restart == 1 {
            // The sandbox's process, too: even if something holds the namespace, there is no process by which it is found.
            web.kill_processes().unwrap();
        }
    }
    assert_eq!(enrolments(&b, "default/web").len(), 1);
    assert!(pod_status(&b, "default/web").unwrap().enrolled);
}

#[test]
fn a_recreated_sandbox_belongs_to_its_pod() {
    let mesh = pair();
    let (client, old) = (mesh.pod("client"), mesh.pod("web"));
    let (_client, gone) = (pause(&client), pause(&old));
    let (a, b) = daemons(&mesh);
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    let before = (netns(&old), b.status().unwrap().kernel.pods);
    drop(gone);
    let web = mesh.recreate_pod("web").unwrap();
    drop(old);
    let _sandbox = pause(&web);
    let _echo = web
        .container("c1")
        .unwrap()
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    eventually(TIMEOUT, "the new sandbox to be served", || {
        let status = pod_status(&b, "default/web")?;
        (status.enrolled && status.netns == Some(netns(&web))).then_some(())
    })
    .unwrap();
    for to in ways(&web) {
        echoes(&client, to);
    }
    assert_ne!(netns(&web), before.0);
    assert_eq!(enrolments(&b, "default/web").len(), 2);
    eventually(TIMEOUT, "the kernel to forget the old sandbox", || {
        (b.status().ok()?.kernel.pods == before.1).then_some(())
    })
    .unwrap();
    eventually_ok(TIMEOUT, "the old namespace to be released", || {
        let held = fs::read_dir(format!("/proc/{}/fd", b.pid()))?
            .flatten()
            .filter(|entry| {
                fs::read_link(entry.path()).is_ok_and(|link| link == Path::new(&before.0))
            })
            .count();
        anyhow::ensure!(held == 0, "it is held {held} times");
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_nodes_namespace_is_no_pods() {
    let mesh = pair();
    let web = mesh.pod("web");
    let (_a, b) = daemons(&mesh);
    // As a runtime's monitor is, in the pod's cgroup.
    let monitor = mesh.node("b").spawn("sleep", ["1000"]).unwrap();
    join(
        &web.container("conmon")
            .unwrap()
            .cgroup()
            .join("cgroup.procs"),
        &monitor,
    );
    let why = eventually(TIMEOUT, "the process to be seen", || {
        let status = pod_status(&b, "default/web")?;
        assert!(!status.enrolled);
        status
            .reason
            .filter(|reason| reason.contains("the node's own"))
    });
    why.unwrap();
    // Beside a sandbox it does not matter, though it is older.
    let _sandbox = pause(&web);
    b.wait_enrolled(&["default/web"]).unwrap();
    let status = pod_status(&b, "default/web").unwrap();
    assert_eq!(status.netns, Some(netns(&web)));
}

#[test]
fn a_process_that_unshares_does_not_mislead_the_daemon() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _client = pause(&client);
    let _sandbox = pause(&web);
    let app = web.container("c1").unwrap();
    // A container's first process, and children of another one's.
    let first = app.spawn("unshare", ["-n", "sleep", "1000"]).unwrap();
    let other = web.container("c2").unwrap();
    let script = "for n in 1 2 3; do unshare -n sleep 1000 & done; wait";
    let _runtime = other.spawn("sh", ["-c", script]).unwrap();
    eventually(TIMEOUT, "it to have left", || {
        let link = fs::read_link(format!("/proc/{}/ns/net", first.pid())).ok()?;
        (link != Path::new(&netns(&web))).then_some(())
    })
    .unwrap();
    let (a, b) = daemons(&mesh);
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    let _echo = app
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    echoes(&client, web.at(8080));
    // A socket in an unknown namespace makes the daemon scan again.
    let inside = Path::new("/proc")
        .join(first.pid().to_string())
        .join("ns/net");
    let mut strange = app.command(mesh_tests::pod_app().unwrap()).unwrap();
    enter(&mut strange, &inside);
    strange.args(["echo-server", "--port", "9"]);
    let _strange = Process::spawn(strange).unwrap();
    // Longer than such a scan may be delayed.
    std::thread::sleep(Duration::from_millis(2500));
    let status = pod_status(&b, "default/web").unwrap();
    assert_eq!((status.enrolled, status.netns), (true, Some(netns(&web))));
    let proof = status.found_by.unwrap();
    assert!(
        proof.contains("an interface leads from its network namespace to the node"),
        "{proof}"
    );
    assert_eq!(enrolments(&b, "default/web").len(), 1);
}

/// The first processes of most containers are in a namespace that the pod made, and nothing is left of the sandbox's own, as
/// with CRI-O.
#[test]
fn most_of_its_processes_elsewhere_do_not_move_a_pod() {
    let mesh = pair();
    let web = mesh.pod("web");
    let unshare = |container: &str| {
        let container = web.container(container).unwrap();
        container.spawn("unshare", ["-n", "sleep", "1000"]).unwrap()
    };
    let first = unshare("c1");
    let _second = unshare("c2");
    eventually(TIMEOUT, "it to have left", || {
        let link = fs::read_link(format!("/proc/{}/ns/net", first.pid())).ok()?;
        (link != Path::new(&netns(&web))).then_some(())
    })
    .unwrap();
    let _app = sleep(&web.container("c3").unwrap());
    let (_a, b) = daemons(&mesh);
    b.wait_enrolled(&["default/web"]).unwrap();
    let status = pod_status(&b, "default/web").unwrap();
    assert_eq!((status.enrolled, status.netns), (true, Some(netns(&web))));
}

#[test]
fn processes_of_other_pods_are_not_read_to_find_one() {
    const PROCESSES: usize = 500;
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let neighbour = PodSpec::new("neighbour").on("b").by_uid();
    let neighbour = mesh.add_pod(neighbour).unwrap();
    let script = format!("for n in $(seq {PROCESSES}); do sleep 1000 & done; wait");
    let _many = neighbour
        .container("c1")
        .unwrap()
        .spawn("sh", ["-c", &script])
        .unwrap();
    eventually(TIMEOUT, "its processes", || {
        let members = fs::read_to_string(neighbour.cgroup().join("c1/cgroup.procs")).ok()?;
        (members.lines().count() > PROCESSES).then_some(())
    })
    .unwrap();
    let options = DaemonOptions::default().log_level("debug");
    let b = mesh.node("b").start_daemon_with(options).unwrap();
    b.wait_enrolled(&["default/neighbour"]).unwrap();
    let start = b.log_position();
    let _processes = [pause(&client), pause(&web)];
    b.wait_enrolled(&["default/web"]).unwrap();
    let line = b
        .wait_for_log_after(start, "the scan", TIMEOUT, |line| {
            // Scans that found nothing yet say so, too.
            line["message"] == "scanned the cgroups of pods for their processes"
                && line["pods"] == 1
                && line["processes"] != 0
        })
        .unwrap();
    assert_eq!(line["processes"], 1, "{line}");
}

#[test]
fn a_pod_cannot_take_anothers_name_with_cgroups_of_its_own() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let (a, _b) = daemons(&mesh);
    // web's name, in a cgroup of a pod of node a, on which web is declared now.
    let change = |pod: &mut Value| pod["spec"]["nodeName"] = "a".into();
    mesh.manifests()
        .edit("Pod", "default", "web", change)
        .unwrap();
    let nested = client
        .container(&format!("c1/pod{}/c1", web.uid()))
        .unwrap();
    let _impostor = sleep(&nested);
    a.wait_enrolled(&["default/client"]).unwrap();
    let status = eventually(TIMEOUT, "web to be known", || pod_status(&a, "default/web")).unwrap();
    assert!(!status.enrolled);
    let client_status = pod_status(&a, "default/client").unwrap();
    assert_eq!(client_status.netns, Some(netns(&client)));
}

#[test]
fn two_pods_in_one_namespace_are_both_refused() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _client = pause(&client);
    let _sandbox = pause(&web);
    let (a, b) = daemons(&mesh);
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let mut chat = client.app(&format!("chat --to {}", web.at(8080))).unwrap();
    chat.event("round", TIMEOUT).unwrap();

    let spec = PodSpec::new("thief")
        .on("b")
        .service_account("thief")
        .by_uid();
    let thief = mesh.add_pod(spec).unwrap();
    let intruder = web.container("x").unwrap();
    let intruder = sleep(&intruder);
    join(
        &thief.container("c1").unwrap().cgroup().join("cgroup.procs"),
        &intruder,
    );
    for (name, other) in [
        ("default/web", "default/thief"),
        ("default/thief", "default/web"),
    ] {
        eventually(TIMEOUT, "both to be refused", || {
            let status = pod_status(&b, name)?;
            let reason = status.reason.unwrap_or_default();
            (!status.enrolled && reason.contains(other)).then_some(())
        })
        .unwrap();
    }
    assert_reset(&chat.failure(TIMEOUT).unwrap());
    assert_held(&mesh, &web, &client);

    drop(intruder);
    b.wait_enrolled(&["default/web"]).unwrap();
    echoes(&client, web.at(8080));
    assert!(!pod_status(&b, "default/thief").unwrap().enrolled);
}

#[test]
fn two_objects_with_one_uid_are_both_refused() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _sandboxes = [pause(&client), pause(&web)];
    let (a, b) = daemons(&mesh);
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let mut thief = web.manifest();
    thief["metadata"]["name"] = "thief".into();
    thief["spec"]["serviceAccountName"] = "thief".into();
    thief["status"]["podIP"] = Value::Null;
    thief["status"]["podIPs"] = Value::Null;
    mesh.manifests().apply(&thief).unwrap();
    for name in ["default/web", "default/thief"] {
        eventually(TIMEOUT, "both to be refused", || {
            (!pod_status(&b, name)?.enrolled).then_some(())
        })
        .unwrap();
    }
    assert_held(&mesh, &web, &client);
    // The next daemon decides the same.
    b.kill().unwrap();
    let b = mesh.node("b").start_daemon().unwrap();
    eventually(TIMEOUT, "the next daemon's view", || {
        let status = pod_status(&b, "default/web")?;
        (!status.enrolled && status.reason.is_some()).then_some(())
    })
    .unwrap();
    assert_held(&mesh, &web, &client);
    mesh.manifests().remove("Pod", "default", "thief").unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    echoes(&client, web.at(8080));
}

#[test]
fn the_next_daemon_finds_them_before_it_releases_any() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _sandboxes = [pause(&client), pause(&web)];
    let (a, b) = daemons(&mesh);
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    b.kill().unwrap();
    let b = mesh.node("b").start_daemon().unwrap();
    let status = pod_status(&b, "default/web").unwrap();
    assert!(status.enrolled, "when it is ready they are: {status:?}");
    let gone = |line: &Value| {
        let message = line["message"].as_str().unwrap_or_default();
        message.contains("is gone") || message.contains("released")
    };
    let lines: Vec<_> = b.logs().into_iter().filter(gone).collect();
    assert!(lines.is_empty(), "{lines:?}");
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    echoes(&client, web.at(8080));
}

#[test]
fn cgroup_v1_alone_is_enough() {
    let Some(hierarchy) = v1_hierarchy() else {
        eprintln!("skipped: no cgroup v1 is mounted here");
        return;
    };
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _client = pause(&client);
    let (a, b) = daemons(&mesh);
    a.wait_enrolled(&["default/client"]).unwrap();
    let cgroup = V1::make(&hierarchy, &mesh, &web);
    // Its cgroup of version 2 does not say which pod's it is.
    let path = web.netns().path();
    let enter = [&format!("--net={}", path.display()), "sleep", "1000"];
    let sandbox = mesh.node("b").spawn("nsenter", enter).unwrap();
    join(&cgroup.0.join("cgroup.procs"), &sandbox);
    b.wait_enrolled(&["default/web"]).unwrap();
    let status = pod_status(&b, "default/web").unwrap();
    assert_eq!(status.netns, Some(netns(&web)));
    drop(sandbox);
}

/// A hierarchy of cgroup v1, if there is one.
fn v1_hierarchy() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup").then(|| PathBuf::from(path))
    });
    mounts.into_iter().find(|path| path.ends_with("pids"))
}

/// A container's cgroup of version 1, with those above it.
struct V1(PathBuf, PathBuf);

impl V1 {
    fn make(hierarchy: &Path, mesh: &Mesh, pod: &Pod) -> Self {
        let top = hierarchy.join(format!("auth-mesh-{}", mesh.id()));
        let cgroup = top.join(format!("kubepods/burstable/pod{}/c1", pod.uid()));
        fs::create_dir_all(&cgroup).unwrap();
        Self(cgroup, top)
    }
}

impl Drop for V1 {
    fn drop(&mut self) {
        for folder in self
            .0
            .ancestors()
            .take_while(|path| path.starts_with(&self.1))
        {
            // Its last process may be on its way out.
            let _ = eventually(Duration::from_secs(10), "an empty cgroup", || {
                fs::remove_dir(folder).ok()
            });
        }
    }
}

fn join(procs: &Path, process: &Process) {
    fs::write(procs, process.pid().to_string()).unwrap();
}

/// Makes the command run in the network namespace at `path`, after its other preparations.
fn enter(command: &mut std::process::Command, path: &Path) {
    let file = fs::File::open(path).unwrap();
    // SAFETY: between fork and exec only setns(2) is called, which is async-signal-safe, on a file that the closure owns.
    unsafe {
        command.pre_exec(move || {
            nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(std::io::Error::from)
        });
    }
}

/// The pod is refused, not released: it neither sends nor receives plaintext.
fn assert_held(mesh: &Mesh, pod: &Pod, other: &Pod) {
    let dialled = call(pod, other.at(8080));
    assert_eq!(dialled["errno"], "EPERM", "{dialled}");
    assert_reset_or_refused(&call(mesh.outside(), pod.at(8080)));
}

fn assert_reset_or_refused(event: &Value) {
    let errno = event["errno"].as_str().unwrap_or_default();
    assert!(matches!(errno, "ECONNRESET" | "ECONNREFUSED"), "{event}");
}
