//! Apps get certificates of their own by the SPIFFE Workload API, if their account may use it, and only in their own pod.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    CaOptions, Daemon, DaemonOptions, Mesh, Package, Place, PodSpec, Process, TIMEOUT,
};
use serde_json::{Value, json};

use crate::common::with_ca::spiffe;

const PORT: u16 = 15082;
/// The shortest lifetime that a daemon accepts: certificates are renewed every four to six seconds.
const LIFETIME: Duration = Duration::from_secs(10);

/// A node with two pods.
fn stage(settings: &[(&str, Value)]) -> Result<(Mesh, Daemon)> {
    let mesh = pods()?;
    let daemon = start(&mesh, settings, DaemonOptions::default())?;
    Ok((mesh, daemon))
}

fn pods() -> Result<Mesh> {
    let pod = |name: &str| PodSpec::new(name).service_account(name);
    Mesh::builder()
        .node("a")
        .pod(pod("allowed"))
        .pod(pod("other"))
        .start()
}

fn start(mesh: &Mesh, settings: &[(&str, Value)], mut options: DaemonOptions) -> Result<Daemon> {
    for (name, value) in settings {
        options = options.setting(name, value.clone());
    }
    Ok(mesh.start_daemons_with(&options)?.remove(0))
}

fn allow(accounts: &[&str]) -> (&'static str, Value) {
    let lifetime = format!("{}s", LIFETIME.as_secs());
    (
        "workloadApi",
        json!({"accounts": accounts, "certificateLifetime": lifetime}),
    )
}

#[test]
fn spiffes_python_client_gets_certificates_as_they_are_renewed_and_tokens() -> Result<()> {
    const TEST: &str = "spiffes_python_client_gets_certificates_as_they_are_renewed_and_tokens";
    let Some(packages) = Package::folders(TEST, &Package::SPIFFE) else {
        return Ok(());
    };
    let mesh = pods()?;
    let socket = mesh.node("a").place().folder().join("api/api.sock");
    let (name, mut settings) = allow(&["default/allowed"]);
    settings["socket"] = json!(socket);
    let ca = mesh.start_ca(&CaOptions::default())?;
    let daemon = start(&mesh, &[(name, settings)], DaemonOptions::default().ca(&ca))?;
    let pod = mesh.pod("allowed");
    wait_open(&daemon, "default/allowed")?;
    let mut command = pod.command("python3")?;
    command
        .args(["-c", include_str!("python/workload_api.py")])
        .env("PYTHONPATH", std::env::join_paths(&packages)?)
        .env(
            "SPIFFE_ENDPOINT_SOCKET",
            format!("unix://{}", socket.display()),
        );
    let done = Process::spawn(command)?.finish(2 * TIMEOUT)?.ok()?;
    let seen = done.json_lines();
    let [first, second, others] = seen.as_slice() else {
        anyhow::bail!("it printed {seen:?}");
    };
    for svid in [first, second] {
        ensure!(svid["id"] == spiffe("allowed"), "{svid}");
    }
    ensure!(first["serial"] != second["serial"], "{first} {second}");
    ensure!(others["roots"] == 1, "{others}");
    ensure!(
        others["jwt"] == spiffe("allowed") && others["keys"] == 1,
        "{others}"
    );
    let refused = others["refused"].as_str().unwrap_or_default();
    ensure!(refused.contains("another audience"), "{others}");
    // Those of the tunnels are others.
    let issued = |purpose: &str| {
        let lines = daemon.logs().into_iter().filter(|line| {
            line["message"] == "certificate issued"
                && line["identity"] == spiffe("allowed")
                && line["purpose"] == purpose
        });
        let serials = lines
            .filter_map(|line| Some(line["serial"].as_str()?.trim_start_matches('0').to_owned()));
        serials.collect::<Vec<_>>()
    };
    let (apps, tunnels) = (issued("workload API"), issued("tunnels"));
    for svid in [first, second] {
        let serial = svid["serial"].as_str().context("no serial")?.to_owned();
        ensure!(apps.contains(&serial), "{serial} is not of {apps:?}");
        ensure!(!tunnels.contains(&serial), "{serial} is a tunnel's");
    }
    Ok(())
}

#[test]
fn documented_command_prints_the_identity() -> Result<()> {
    let page = include_str!("../../../docs/WORKLOAD_API.md");
    let (_, command) = page.split_once("```sh\n").context("no command")?;
    let (command, _) = command.split_once("```").context("no end")?;
    let (mesh, daemon) = stage(&[allow(&["default/*"])])?;
    wait_open(&daemon, "default/other")?;
    let done = mesh.pod("other").run("sh", ["-c", command])?;
    ensure!(done.stdout.trim() == spiffe("other"), "{done:?}");
    Ok(())
}

fn wait_open(daemon: &Daemon, pod: &str) -> Result<()> {
    daemon.wait_for_log("the API", TIMEOUT, |line| {
        line["message"] == "workload API open" && line["pod"] == pod
    })?;
    Ok(())
}

/// Whether the API answers in `place` at `ip`: HTTP/2 begins with SETTINGS (RFC 9113 §3.4).
fn answers(place: &Place, ip: Ipv4Addr) -> bool {
    const SETTINGS: u8 = 4;
    let ask = || -> Result<u8> {
        let mut tcp = place.connect((ip, PORT).into())?;
        tcp.set_read_timeout(Some(TIMEOUT))?;
        tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")?;
        let mut frame = [0; 9];
        tcp.read_exact(&mut frame)?;
        Ok(frame[3])
    };
    ask().is_ok_and(|kind| kind == SETTINGS)
}

#[test]
fn is_open_to_its_own_pod_if_the_account_is_allowed() -> Result<()> {
    let (mesh, daemon) = stage(&[allow(&["default/allowed"])])?;
    let (allowed, other) = (mesh.pod("allowed"), mesh.pod("other"));
    wait_open(&daemon, "default/allowed")?;
    let loopback = Ipv4Addr::LOCALHOST;
    ensure!(answers(allowed.place(), loopback), "it does not answer");
    let node = mesh.node("a").place();
    for (name, place) in [("another account", other.place()), ("the node", node)] {
        ensure!(!answers(place, loopback), "{name} has it");
    }
    for (name, place) in [
        ("the node", node),
        ("another pod", other.place()),
        ("its own pod", allowed.place()),
    ] {
        let answered = answers(place, allowed.ipv4());
        ensure!(!answered, "it answers {name} at the pod's address");
    }
    Ok(())
}

#[test]
fn is_open_to_nobody_by_default() -> Result<()> {
    let (mesh, daemon) = stage(&[])?;
    ensure!(!answers(mesh.pod("allowed").place(), Ipv4Addr::LOCALHOST));
    let logs = daemon.logs();
    let mut opened = logs
        .iter()
        .filter(|line| line["message"] == "workload API open");
    ensure!(opened.next().is_none(), "it is open");
    Ok(())
}
