//! Secure naming: the server's identity must be one that may run the destination, as the client's node knows it.

use std::time::Duration;

use mesh_tests::{
    Context, Daemon, Finished, Mesh, Nginx, PodSpec, Result, ServiceSpec, TIMEOUT, eventually_ok,
};

const SERVICE: &str = "10.96.0.7:80";
/// Part of the request path.
const SECRET: &str = "what-only-web-may-hear";
/// Limit for discovery, which takes a second on an idle machine.
const SOON: Duration = Duration::from_secs(10);

fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

fn server(name: &str) -> PodSpec {
    PodSpec::new(name)
        .on("b")
        .service_account(name)
        .label("app", "web")
}

fn service() -> ServiceSpec {
    ServiceSpec::new("web")
        .selector("app", "web")
        .address("10.96.0.7")
        .port(80, 8080)
}

/// A client on node a; on node b the pods `web` and `other`, of the accounts of the same names, behind one service.
fn two_accounts(service: ServiceSpec) -> Result<Mesh> {
    Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(server("web"))
        .pod(server("other"))
        .service(service)
        .start()
}

/// Sends this number of requests, each on its own connection.
fn ask(mesh: &Mesh, to: &str, requests: usize) -> Result<Finished> {
    let url = format!("http://{to}/{SECRET}/[1-{requests}]");
    let arguments = [
        "-sS",
        "-m",
        "15",
        "-H",
        "Connection: close",
        "-w",
        " ",
        &url,
    ];
    mesh.pod("client").run("curl", arguments)
}

/// Waits until the client gets only these answers from the service.
fn only(mesh: &Mesh, body: &str) -> Result<()> {
    eventually_ok(SOON, &format!("all answers to be {body}'s"), || {
        let answers = ask(mesh, SERVICE, 10)?.ok()?.stdout;
        let wrong = answers.split_whitespace().find(|answer| *answer != body);
        wrong.map_or(Ok(()), |wrong| Err(anyhow::anyhow!("{wrong} answers")))
    })
}

#[test]
fn only_pinned_accounts_may_run_a_service() -> Result<()> {
    let mesh = two_accounts(service().service_accounts("web"))?;
    let web = Nginx::start(&mesh.pod("web"), 8080, "web")?;
    let other = Nginx::start(&mesh.pod("other"), 8080, "other")?;
    let daemons = mesh.start_daemons()?;
    let answers = ask(&mesh, SERVICE, 40)?.ok()?.stdout;
    assert_eq!(answers.trim(), vec!["web"; 40].join(" "));
    // nginx logs a request after it has answered it.
    eventually_ok(SOON, "all requests in the log", || {
        let logged = web.requests().len();
        anyhow::ensure!(logged == 40, "{logged} requests");
        Ok(())
    })?;
    assert_eq!(other.requests().len(), 0, "the other was asked");

    // First another account is pinned, by its full name, then an account of another namespace with the same short name.
    mesh.manifests()
        .apply(&service().service_accounts("default/other").manifest())?;
    only(&mesh, "other")?;
    mesh.manifests()
        .apply(&service().service_accounts("elsewhere/web").manifest())?;
    let refused = eventually_ok(SOON, "the service to be refused", || {
        let answer = ask(&mesh, SERVICE, 1)?;
        anyhow::ensure!(!answer.status.success(), "{} answers", answer.stdout);
        Ok(answer)
    })?;
    assert_eq!(refused.stdout.trim(), "", "an error has no answer");
    assert_ne!(
        refused.code(),
        Some(28),
        "curl timed out: {}",
        refused.stderr
    );
    let line = daemons[0].wait_for_access("the refusal", TIMEOUT, |line| {
        line["result"] == "refused" && line["service"] == "default/web"
    })?;
    let reason = line["reason"].as_str().unwrap_or_default();
    assert!(
        reason.contains("no ready endpoint") && reason.contains("may run it"),
        "{line:#}"
    );

    // With both accounts pinned, both pods answer.
    mesh.manifests()
        .apply(&service().service_accounts("web, other").manifest())?;
    eventually_ok(SOON, "both to answer", || {
        let answers = ask(&mesh, SERVICE, 40)?.ok()?.stdout;
        anyhow::ensure!(
            answers.contains("web") && answers.contains("other"),
            "{answers}"
        );
        Ok(())
    })
}

/// Tells only node b that its pod `web` runs as `impostor`, so that its daemon presents that identity.
fn impostor(mesh: &Mesh) -> Result<()> {
    mesh.node("b")
        .manifests()
        .edit("Pod", "default", "web", |pod| {
            pod["spec"]["serviceAccountName"] = "impostor".into();
        })
}

#[test]
fn impostor_receives_no_byte_of_the_request() -> Result<()> {
    let mesh = Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(server("web"))
        .service(service())
        .start()?;
    impostor(&mesh)?;
    let nginx = Nginx::start(&mesh.pod("web"), 8080, "web")?;
    let daemons = mesh.start_daemons()?;
    let capture = mesh.wire().capture()?;
    let web = mesh.pod("web");
    let destinations = [
        SERVICE.to_owned(),
        web.at(8080).to_string(),
        web.at6(8080).to_string(),
    ];
    for destination in &destinations {
        let answer = ask(&mesh, destination, 1)?;
        assert!(
            matches!(answer.code(), Some(7 | 55 | 56)) && answer.stdout.trim().is_empty(),
            "{destination}: curl exits with {:?}: {} {}",
            answer.code(),
            answer.stdout,
            answer.stderr
        );
        let line = refusal(&daemons[0], destination)?;
        let reason = line["reason"].as_str().unwrap_or_default();
        let expected = format!(
            "presents {}, but may only be {}",
            spiffe("impostor"),
            spiffe("web")
        );
        assert!(reason.contains(&expected), "{line:#}");
        assert_eq!(line["client_identity"], spiffe("client"), "{line:#}");
        assert_eq!(line["bytes_to_server"], 0, "{line:#}");
    }
    // The impostor's node logged the attempt, and received no request.
    let lines = eventually_ok(SOON, "the other node's lines", || {
        let lines = daemons[1].access_log();
        anyhow::ensure!(lines.len() >= destinations.len(), "{lines:#?}");
        Ok(lines)
    })?;
    for line in &lines {
        assert_eq!(line["result"], "refused", "{line:#}");
        assert_eq!(line["server_identity"], spiffe("impostor"), "{line:#}");
        assert_eq!(line["bytes_to_server"], 0, "{line:#}");
    }
    assert_eq!(lines.len(), destinations.len(), "{lines:#?}");
    assert_eq!(nginx.requests().len(), 0, "the impostor's app was asked");
    assert!(!capture.stop()?.contains(SECRET.as_bytes()));

    // With its own account again, the pod serves again.
    mesh.node("b").manifests().apply(&web.manifest())?;
    only(&mesh, "web")
}

fn refusal(daemon: &Daemon, destination: &str) -> Result<serde_json::Value> {
    let lines = || -> Vec<_> {
        let all = daemon.access_log().into_iter();
        all.filter(|line| line["destination"] == destination)
            .collect()
    };
    daemon
        .wait_for_access(&format!("a line of {destination}"), SOON, |line| {
            line["destination"] == destination
        })
        .with_context(|| daemon.log_text())?;
    let mut lines = lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert_eq!(lines[0]["result"], "refused", "{}", lines[0]);
    Ok(lines.remove(0))
}

#[test]
fn address_claimed_by_two_pods_is_refused() -> Result<()> {
    let mesh = two_accounts(service())?;
    let nginx = Nginx::start(&mesh.pod("web"), 8080, "web")?;
    let daemons = mesh.start_daemons()?;
    let web = mesh.pod("web");
    ask(&mesh, &web.at(8080).to_string(), 1)?.ok()?;
    // Someone with write access to pods claims web's address for another account.
    let mut claim = mesh.pod("other").manifest();
    claim["metadata"]["name"] = "claimant".into();
    claim["spec"]["nodeName"] = "nowhere".into();
    claim["status"]["podIP"] = web.ipv4().to_string().into();
    claim["status"]["podIPs"] = serde_json::json!([{"ip": web.ipv4()}]);
    mesh.node("a").manifests().apply(&claim)?;
    eventually_ok(SOON, "the address to be refused", || {
        let answer = ask(&mesh, &web.at(8080).to_string(), 1)?;
        anyhow::ensure!(!answer.status.success(), "{} answers", answer.stdout);
        Ok(())
    })?;
    let line =
        daemons[0].wait_for_access("the refusal", SOON, |line| line["result"] == "refused")?;
    let reason = line["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("claimed by more than one"), "{line:#}");
    mesh.node("a")
        .manifests()
        .remove("Pod", "default", "claimant")?;
    eventually_ok(SOON, "the address to be web's again", || {
        ask(&mesh, &web.at(8080).to_string(), 1)?.ok()
    })?;
    drop(nginx);
    Ok(())
}
