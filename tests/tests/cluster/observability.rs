//! Steps about what a user sees of the cluster from a machine outside it, through the API server alone.

use mesh_tests::{Context, Finished, Process, Result, auth_daemon, eventually_ok, http_get};
use serde_json::{Value, json};

use crate::stage::{APPS, PATIENCE, SYSTEM, Stage, account, ensure, role};
use crate::terminal::Terminal;
use crate::traffic::who;

/// Runs a command of the daemon's program outside the cluster, with the API server's credentials of an administrator.
fn auth(stage: &Stage, words: &str, kubeconfig: &std::path::Path) -> Result<Finished> {
    let outside = stage.cluster.mesh().outside();
    let mut command = outside.command(auth_daemon()?)?;
    command.args(words.split_whitespace());
    command.arg("--kubeconfig").arg(kubeconfig);
    Process::spawn(command)?.finish(PATIENCE)
}

/// The status and the connections of all nodes, merged; and not without the right to forward ports.
pub(crate) fn through_the_api_server(stage: &Stage) -> Result<()> {
    let administrator = stage.cluster.api().kubeconfig();
    let expected: Vec<_> = (stage.cluster.nodes().iter())
        .map(|node| node.name())
        .collect();
    // The command leaves out a daemon that does not answer within its time limit.
    eventually_ok(PATIENCE, "the status of both nodes", || {
        let status = auth(stage, "status --json", &administrator)?;
        let cluster: Value = serde_json::from_str(&status.stdout)
            .with_context(|| format!("{}{}", status.stdout, status.stderr))?;
        let names: Vec<_> = (cluster["nodes"].as_array().into_iter().flatten())
            .map(|node| node["node"].as_str().unwrap_or_default())
            .collect();
        ensure(names == expected, || format!("{names:?}: {cluster}"))
    })?;
    println!("{}", auth(stage, "status", &administrator)?.stdout);

    stage.curl("client-1", &who(stage, "web-2")?)?;
    let both = eventually_ok(PATIENCE, "connections seen by both nodes", || {
        let words = format!("observe --from {APPS} --to {APPS} --verdict allowed");
        let flows = auth(stage, &words, &administrator)?.ok()?.json_lines();
        let seen = |node: &str| flows.iter().any(|flow| flow["node"] == node);
        ensure(expected.iter().all(|node| seen(node)), || {
            format!("{flows:?}")
        })?;
        Ok(flows)
    })?;
    let times: Vec<_> = both.iter().map(|flow| flow["time"].as_str()).collect();
    ensure(times.is_sorted(), || format!("{times:?}"))?;

    // A user who may list the daemons' pods, but not forward their ports, learns why nothing is shown.
    let list = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]});
    let forward =
        json!({"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["get", "create"]});
    let viewer_may = |rules: Value| role(Some(SYSTEM), "viewer", &rules);
    stage.apply(&[&[account("viewer")], viewer_may(json!([list])).as_slice()].concat())?;
    let viewer = stage.cluster.api().kubeconfig_of(APPS, "viewer")?;
    // Rights take effect a moment after they are granted: until then, it may not list the pods either.
    eventually_ok(PATIENCE, "the right to list pods", || {
        let refused = auth(stage, "status", &viewer)?;
        ensure(
            refused.code() == Some(2) && refused.stderr.contains("pods/portforward"),
            || format!("{refused:?}"),
        )
    })?;
    stage.apply(&viewer_may(json!([list, forward])))?;
    eventually_ok(PATIENCE, "the right to forward ports", || {
        let node = format!("status --json --node {}", expected[0]);
        let shown = auth(stage, &node, &viewer)?;
        let status: Value = serde_json::from_str(&shown.stdout).context(shown.stderr)?;
        ensure(status["node"] == expected[0], || status.to_string())
    })
}

/// The page in a browser and the table in a terminal, of all nodes.
pub(crate) fn page_and_table(stage: &Stage) -> Result<()> {
    let outside = stage.cluster.mesh().outside();
    let administrator = stage.cluster.api().kubeconfig();
    let kubeconfig = administrator.display();
    let mut command = outside.command(auth_daemon()?)?;
    command.args(["ui", "--kubeconfig"]).arg(&administrator);
    let mut ui = Process::spawn(command)?;
    let server = ui.wait_for_line("the page's address", PATIENCE, |line| {
        let address = line.strip_prefix("http://")?.strip_suffix('/')?;
        address.parse().ok()
    })?;
    let get = |path: &str| http_get(outside.netns(), server, path);
    let page = get("/")?;
    ensure(page.body.contains("<title>"), || page.body.clone())?;
    let nodes: Value = serde_json::from_str(&get("/nodes")?.body)?;
    let names: Vec<_> = (nodes["nodes"].as_array().into_iter().flatten())
        .filter_map(|node| node["name"].as_str())
        .collect();
    let expected = stage.cluster.nodes().iter().map(|node| node.name());
    ensure(names == expected.collect::<Vec<_>>(), || nodes.to_string())?;

    stage.curl("client-1", &who(stage, "web-2")?)?;
    let live = |name: &str| -> Result<Value> {
        // All connections and all pairs.
        let answer = get(&format!("/node/{name}/live/0/0"))?;
        serde_json::from_str(&answer.body).context(answer.body)
    };
    let is_between_apps = |pair: &Value| {
        let of = |side: &str| pair[side]["namespace"] == APPS;
        of("client") && of("server") && pair["path"] == "tunnel" && pair["verdict"] == "allowed"
    };
    for name in names {
        eventually_ok(PATIENCE, "a connection between apps on the page", || {
            let live = live(name)?;
            let pairs = live["pairs"]["pairs"].as_array().context("no pairs")?;
            ensure(pairs.iter().any(is_between_apps), || live.to_string())?;
            let flows = live["flows"]["flows"].as_array();
            ensure(flows.is_some_and(|flows| !flows.is_empty()), || {
                live.to_string()
            })
        })?;
    }

    let folder = administrator.parent().context("a file in a folder")?;
    let Some(terminal) =
        Terminal::start(outside, folder, &format!("top --kubeconfig {kubeconfig}"))
    else {
        println!("SKIPPED top: tmux is not installed (Debian package tmux)");
        return Ok(());
    };
    let server = format!("{APPS}/web-2");
    let screen = terminal.shows("the pairs of both nodes", |screen| {
        screen.contains("2 nodes, ") && screen.contains(&server) && screen.contains("TLS 1.3")
    });
    println!("{screen}");
    terminal.press(&["q"]);
    terminal.shows("the end", |screen| screen.contains("it ended with 0"));
    Ok(())
}
