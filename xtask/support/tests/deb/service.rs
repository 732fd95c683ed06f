//! A machine outside Kubernetes: installs the package, joins the trust domain, serves its pods, and removes the package.

use std::fs;
use std::net::SocketAddr;

use mesh_tests::{Ca, CaOptions, DaemonOptions, Mesh, Pod, PodSpec, TIMEOUT, eventually};
use serde_json::{Value, json};

use crate::Package;
use crate::machine::Machine;

const MARKER: &str = "marker-that-nobody-may-read";
const CONFIG: &str = "/etc/auth-daemon/config.yaml";
const TOKEN: &str = "/etc/auth-daemon/join-token";
const PINS: &str = "/sys/fs/bpf/auth-daemon";
const STATE: &str = "/var/lib/auth-daemon";
/// Where the machine keeps its service's output, instead of a journal.
const LOG: &str = "/var/log/auth-daemon.log";
const DROP_INS: &str = "/etc/systemd/system/auth-daemon.service.d";
const INSTALL: &str = "dpkg --install /root/auth-daemon.deb";

#[test]
fn machine_installs_runs_and_removes_it() {
    let name = "machine_installs_runs_and_removes_it";
    if let Some(missing) = Machine::missing() {
        println!("SKIPPED {name}: {missing}");
        return;
    }
    let Some(package) = Package::pack(name) else {
        return;
    };
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(PodSpec::new("web").on("b").service_account("web"))
        .start()
        .unwrap();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let address = web.at(8080);
    let echo = web.app("echo-server --port 8080").unwrap();
    let _echo = echo.listening().unwrap();
    // Node a has no token: it joins.
    let token_of_b = mesh.outside().folder().join("ca/tokens/b");
    let attestation = json!({"tokens": [{"node": "b", "tokenFile": token_of_b}]});
    let ca = CaOptions::default().setting("attestation", attestation);
    let ca = mesh.start_ca(&ca).unwrap();
    let options = DaemonOptions::default().permissive().ca(&ca);
    let b = mesh.node("b").start_daemon_with(options).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();

    let machine = Machine::boot(mesh.node("a")).unwrap();
    fs::copy(&package.path, machine.path("/root/auth-daemon.deb")).unwrap();
    machine.ok(INSTALL);
    machine.ok("systemd-analyze verify auth-daemon.service");
    machine.ok(&format!("mkdir {DROP_INS}"));
    machine.write(
        &format!("{DROP_INS}/log.conf"),
        &format!("[Service]\nStandardError=append:{LOG}\n"),
    );
    machine.ok("systemctl daemon-reload");

    // Nobody has configured it, and it says so.
    for refused in ["is-enabled", "is-active", "start"] {
        let said = machine.run(&format!("systemctl {refused} auth-daemon"));
        let said = said.unwrap();
        assert!(!said.status.success(), "{refused}: {}", said.stdout);
    }
    let log = machine.read(LOG);
    assert!(log.contains("ca: has neither directory"), "{log}");
    assert_eq!(call(&client, address)["text"], MARKER);

    configure(&machine, &mesh, &ca);
    let config = machine.read(CONFIG);
    started(&machine, "enable --now");
    // It has said that it is ready, so its pods are enrolled.
    // Their certificates may still be under way, which the status calls a problem.
    let status = machine.run("auth-daemon status --json").unwrap();
    let status: Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["ready"], true, "{status:#}");
    assert_eq!(status["pods"][0]["enrolled"], true, "{status:#}");
    serves(&machine, &mesh, &client, address);
    confined(&machine);

    // Stopped: the pods stay captured, and are refused. It needs no token to start again.
    machine.ok("systemctl stop auth-daemon");
    assert_eq!(property(&machine, "Result"), "success");
    let event = call(&client, address);
    let refused = (&event["stage"], &event["errno"]);
    assert_eq!(
        refused,
        (&"connect".into(), &"ECONNREFUSED".into()),
        "{event}"
    );
    fs::remove_file(machine.path(TOKEN)).unwrap();
    started(&machine, "start");
    serves(&machine, &mesh, &client, address);

    // Upgraded: another process serves the pods, with the configuration as it was.
    let before = property(&machine, "MainPID");
    machine.ok(INSTALL);
    assert_ne!(property(&machine, "MainPID"), before);
    assert_eq!(machine.read(CONFIG), config);
    serves(&machine, &mesh, &client, address);

    // Killed: started again.
    let before = property(&machine, "MainPID");
    machine.ok(&format!("kill -KILL {before}"));
    eventually(TIMEOUT, "the service to run again", || {
        // 0 while nothing runs.
        let is_another = ![before.as_str(), "0"].contains(&&*property(&machine, "MainPID"));
        (is_another && property(&machine, "ActiveState") == "active").then_some(())
    })
    .unwrap();
    serves(&machine, &mesh, &client, address);

    // Removed: nothing is captured any more, and the machine's key stays.
    machine.ok("dpkg --remove auth-daemon");
    assert!(!machine.exists(PINS));
    let recording = mesh.wire().capture().unwrap();
    assert_eq!(call(&client, address)["text"], MARKER);
    assert!(recording.stop().unwrap().contains(MARKER.as_bytes()));
    assert!(machine.exists(&format!("{STATE}/node/node.pem")));
    assert!(machine.exists(CONFIG));
    machine.ok("dpkg --purge auth-daemon");
    assert!(!machine.exists(STATE));
    assert!(!machine.exists(CONFIG));
}

/// Does what docs/DEBIAN.md tells the administrator to do.
fn configure(machine: &Machine, mesh: &Mesh, ca: &Ca) {
    let token = ca.operate(&["token", "create", "--node", "a"]).unwrap();
    machine.write(TOKEN, &token.ok().unwrap().stdout);
    let roots = fs::read_to_string(ca.roots()).unwrap();
    machine.write("/etc/auth-daemon/root-cert.pem", &roots);
    for manifest in fs::read_dir(mesh.node("a").manifests().folder()).unwrap() {
        let manifest = manifest.unwrap();
        let name = manifest.file_name().into_string().unwrap();
        let text = fs::read_to_string(manifest.path()).unwrap();
        machine.write(&format!("/etc/auth-daemon/manifests/{name}"), &text);
    }
    let address = format!("address: {}", ca.address());
    let config = machine
        .read(CONFIG)
        .replace("# nodeName: vm-1", "nodeName: a")
        .replace("# address: ca.mesh.example:15012", &address)
        .replace("# podNetworks:", "podNetworks:")
        .replace("# serviceNetworks:", "serviceNetworks:");
    // Last, because systemd starts the failed service again and again.
    machine.write(CONFIG, &config);
}

/// Starts the service, which returns once it has said that it is ready.
fn started(machine: &Machine, how: &str) {
    let said = machine
        .run(&format!("systemctl {how} auth-daemon"))
        .unwrap();
    let log = machine.read(LOG);
    assert!(said.status.success(), "{}{log}", said.stderr);
}

/// Asserts that the pod reaches an address, and that nobody reads along.
fn serves(machine: &Machine, mesh: &Mesh, client: &Pod, address: SocketAddr) {
    let recording = mesh.wire().capture().unwrap();
    let answer = call(client, address);
    assert_eq!(answer["text"], MARKER, "{answer}: {}", machine.read(LOG));
    assert!(!recording.stop().unwrap().contains(MARKER.as_bytes()));
}

/// Asserts that the daemon runs with the unit's restrictions.
fn confined(machine: &Machine) {
    let pid = property(machine, "MainPID");
    let status = machine.read(&format!("/proc/{pid}/status"));
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).unwrap_or_default().to_owned()
    };
    // NET_BIND_SERVICE (10), NET_ADMIN (12), SYS_PTRACE (19), SYS_ADMIN (21), SYS_NICE (23).
    let granted: u64 = [10, 12, 19, 21, 23].map(|bit| 1 << bit).iter().sum();
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(field(set), format!("{granted:016x}"), "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    // A filter of system calls (proc_pid_status(5)).
    assert_eq!(field("Seccomp:"), "2");
    for path in ["/usr/x", "/etc/x", "/run/x", "/proc/sys/kernel/panic"] {
        let touch = format!("nsenter --mount --target {pid} tee {path}");
        let said = machine.run(&touch).unwrap();
        let is_refused = said.stderr.contains("Read-only file system");
        assert!(is_refused, "{path}: {}", said.stderr);
    }
    // Its pins are the machine's.
    assert!(machine.exists(PINS));
    // What the machine mounts later, such as the namespace of a new pod, is there for the daemon.
    machine.ok("mkdir /run/later");
    machine.ok("mount -t tmpfs later /run/later");
    let mounts = machine.read(&format!("/proc/{pid}/mountinfo"));
    assert!(mounts.contains(" /run/later "), "{mounts}");
}

/// Has the pod send the marker to an address, and returns the last event.
fn call(from: &Pod, to: SocketAddr) -> Value {
    let arguments = format!("connect --to {to} --timeout 10000 --send {MARKER} --shutdown --read");
    let finished = from.app(&arguments).unwrap().finish(TIMEOUT).unwrap();
    finished.json_lines().pop().unwrap()
}

/// A property of the service.
fn property(machine: &Machine, name: &str) -> String {
    let shown = machine.ok(&format!(
        "systemctl show --value --property {name} auth-daemon"
    ));
    shown.trim().to_owned()
}
