//! Two more clients of the server's side: Python's h2, and curl's library.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use mesh_tests::{Package, Process, TIMEOUT, eventually_ok};
use serde_json::{Value, json};

use crate::common::authority::files;
use crate::common::stage::{ECHO, HTTP, Stage, WITNESS};
use crate::http2::Client;

const OUTSIDER: &str = "spiffe://cluster.local/ns/default/sa/outsider";
const DENIED: u16 = 11;

/// Runs a script in the outside host with the packages in these folders and a certificate of `outsider`. Returns the
/// object that it prints.
fn run(
    stage: &Stage,
    script: &str,
    packages: &[impl AsRef<Path>],
    arguments: &[&str],
) -> Result<Value> {
    let outside = stage.mesh.outside();
    files(
        &stage.mesh.node("b").ca_folder(),
        "outsider",
        outside.folder(),
    )?;
    let path = std::env::join_paths(packages.iter().map(AsRef::as_ref))?;
    let mut command = outside.command("python3")?;
    command
        .args(["-c", script])
        .arg(outside.folder())
        .args(arguments)
        .env("PYTHONPATH", path);
    let done = Process::spawn(command)?.finish(2 * TIMEOUT)?.ok()?;
    done.json_lines()
        .pop()
        .context("the script printed nothing")
}

fn deny_one_port(stage: &Stage) -> Result<()> {
    stage.mesh.manifests().apply(&json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "no-eleven", "namespace": "default"},
        "spec": {
            "action": "DENY",
            "rules": [{"to": [{"operation": {"ports": [DENIED.to_string()]}}]}],
        },
    }))?;
    // Until then, it answers 503: nothing listens there.
    eventually_ok(TIMEOUT, "the policy", || {
        let answer = Client::connect(stage, &[])?.ask(1, &stage.web().at(DENIED).to_string())?;
        ensure!(answer == 401, "{answer}");
        Ok(())
    })
}

#[test]
fn pythons_h2_is_served() -> Result<()> {
    let Some(packages) = Package::folders("pythons_h2_is_served", &Package::H2) else {
        return Ok(());
    };
    let stage = Stage::set()?;
    let web = stage.web();
    let _late = web
        .app("half-close --port 15 --after-end --message late --quiet")?
        .listening()?;
    let _reset = web.app("reset --port 10 --after 5 --quiet")?.listening()?;
    deny_one_port(&stage)?;
    let authorities = json!({
        "echo": web.at(ECHO).to_string(),
        "half-close": web.at(15).to_string(),
        "resets": web.at(10).to_string(),
        "witness": web.at(WITNESS).to_string(),
        "malformed": format!("127.0.0.1:{ECHO}"),
        "denied": web.at(DENIED).to_string(),
        "unreachable": web.at(9).to_string(),
    });
    let script = include_str!("python/client.py");
    let arguments = [&*web.ipv4().to_string(), &*authorities.to_string()];
    let seen = run(&stage, script, &packages, &arguments)?;
    let expected = json!({
        "identity": ["spiffe://cluster.local/ns/default/sa/web"],
        "echoed": 1 << 20,
        "after_end": 0,
        "half_close": "late",
        // CANCEL
        "reset": 8,
        "refused": {"malformed": 400, "denied": 401, "unreachable": 503},
    });
    ensure!(seen == expected, "{seen}");
    for (result, port) in [("ok", ECHO), ("reset", WITNESS), ("refused", DENIED)] {
        let to = web.at(port).to_string();
        let line = stage.daemon.wait_for_access(result, TIMEOUT, |line| {
            line["result"] == result && line["destination"] == to.as_str()
        })?;
        ensure!(line["client_identity"] == OUTSIDER, "{line}");
        if port == WITNESS {
            let app = line["client"].as_str().context("no client")?.parse()?;
            let end = stage.witnessed(app)?;
            ensure!(end.contains("ConnectionReset"), "{end}");
        }
    }
    Ok(())
}

#[test]
fn curl_is_served() -> Result<()> {
    let Some(packages) = Package::folders("curl_is_served", &[Package::CURL]) else {
        return Ok(());
    };
    let stage = Stage::set()?;
    deny_one_port(&stage)?;
    let web = stage.web();
    let script = include_str!("python/curl.py");
    let answered = |seen: &Value, code: u16| {
        let answer = format!("CONNECT Response Status {code}");
        let mut said = seen["said"].as_array().into_iter().flatten();
        said.any(|line| *line == answer)
    };
    let get = |port| {
        let url = format!("http://{}/", web.at(port));
        run(
            &stage,
            script,
            &packages,
            &[&web.at(15008).to_string(), &url],
        )
    };
    let seen = get(HTTP)?;
    println!("{}", seen["version"]);
    ensure!(answered(&seen, 200), "{seen}");
    ensure!(seen["body"] == "real traffic goes on", "{seen}");
    let to = web.at(HTTP).to_string();
    let line = stage
        .daemon
        .wait_for_access("the request", TIMEOUT, |line| {
            line["destination"] == to.as_str() && line["client_identity"] == OUTSIDER
        })?;
    // curl closes the connection without ending the stream first.
    ensure!(line["path"] == "hbone", "{line}");
    for (port, code) in [(DENIED, 401), (9, 503)] {
        let refused = get(port)?;
        ensure!(
            answered(&refused, code) && refused["body"] == "",
            "{refused}"
        );
    }
    Ok(())
}
