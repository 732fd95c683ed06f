//! The library itself, without any daemon: what it builds works, shows itself on the wire, and goes away.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mesh_tests::{
    Firewall, InProcess, Iperf3, Mesh, MeshId, Nginx, OpensslServer, PodSpec, ServiceSpec, TIMEOUT,
    TcpState, eventually, remove_dead, tls_records, traces,
};

#[test]
fn plaintext_between_nodes_is_seen_on_the_wire() -> Result<()> {
    let start = Instant::now();
    let mesh = two_nodes()?;
    println!("up after {:?}", start.elapsed());
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let nginx = Nginx::start(&web, 8080, MARKER)?;
    let targets = [
        (
            web.at(8080).to_string(),
            IpAddr::from(client.ipv4()),
            IpAddr::from(web.ipv4()),
        ),
        (
            web.at6(8080).to_string(),
            client.ipv6().into(),
            web.ipv6().into(),
        ),
    ];
    for (number, (target, from, to)) in targets.into_iter().enumerate() {
        let recording = mesh.wire().capture()?;
        let path = format!("/{number}");
        let answer = client
            .run(
                "curl",
                [
                    "-gsS",
                    "-w",
                    " %{remote_ip}",
                    &format!("http://{target}{path}"),
                ],
            )?
            .ok()?;
        assert_eq!(answer.stdout, format!("{MARKER} {to}"));
        let recording = recording.stop()?;
        assert!(recording.contains(MARKER.as_bytes()));
        assert!(!recording.contains(b"something else"));
        assert_eq!(
            recording.connections().into_iter().collect::<Vec<_>>(),
            [(from, (to, 8080).into())]
        );
        // On a busy machine, a SYN may be sent again.
        let syns = recording.syns();
        let ends: BTreeSet<_> = syns
            .packets()
            .iter()
            .map(|syn| (syn.source, syn.destination))
            .collect();
        assert_eq!(ends.len(), 1, "{ends:?}");
        let streams = recording.tcp_between(from, to).streams();
        assert_eq!(streams.len(), 1);
        assert!(streams[0].to_server.starts_with(b"GET /"));
        assert!(streams[0].to_client.ends_with(MARKER.as_bytes()));
        assert!(!streams[0].gap && !streams[0].reset);
        assert_eq!(streams[0].tls_records().expect_err("plaintext").offset, 0);
        let request = nginx.wait_for_request(&path, TIMEOUT)?;
        assert_eq!((request.remote_address, request.server_address), (from, to));
        assert_eq!(
            (request.remote_port, request.status),
            (streams[0].client.port(), 200)
        );
    }
    Ok(())
}

#[test]
fn distinguishes_tls_from_plaintext() -> Result<()> {
    let mesh = two_nodes()?;
    let web = mesh.pod("web");
    let server = OpensslServer::start(&web, 8443, &[])?;
    let recording = mesh.wire().capture()?;
    let url = format!("https://localhost:8443/{MARKER}");
    let certificate = server.certificate().display().to_string();
    let resolve = format!("localhost:8443:{}", web.ipv4());
    mesh.pod("client")
        .run(
            "curl",
            ["-sS", "--cacert", &certificate, "--resolve", &resolve, &url],
        )?
        .ok()?;
    let recording = recording.stop()?;
    assert!(!recording.contains(MARKER.as_bytes()));
    let (to_server, to_client) = recording.streams()[0].tls_records()?;
    assert_eq!(to_server[0].content_type, 22);
    assert!(to_client.iter().any(|record| record.is_application_data()));
    assert_eq!(tls_records(&recording.streams()[0].to_server)?, to_server);
    Ok(())
}

#[test]
fn all_places_reach_each_other_and_services_nobody() -> Result<()> {
    let mesh = two_nodes()?;
    let places = [
        (
            mesh.pod("client").place().clone(),
            mesh.pod("client").addresses().to_vec(),
        ),
        (
            mesh.pod("web").place().clone(),
            mesh.pod("web").addresses().to_vec(),
        ),
        (
            mesh.pod("other/web").place().clone(),
            mesh.pod("other/web").addresses().to_vec(),
        ),
        (
            mesh.node("node-a").place().clone(),
            vec![
                mesh.node("node-a").ipv4().into(),
                mesh.node("node-a").ipv6().into(),
            ],
        ),
        (
            mesh.outside().clone(),
            vec![mesh.outside_ipv4().into(), mesh.outside_ipv6().into()],
        ),
    ];
    let mut servers = Vec::new();
    for (place, _) in &places {
        servers.push(InProcess::start(
            place,
            "[::]:7000".parse()?,
            |mut stream, peer| {
                let _ = stream.write_all(peer.ip().to_canonical().to_string().as_bytes());
            },
        )?);
    }
    for (from, own) in &places {
        for (_, addresses) in &places {
            for address in addresses {
                let mut stream = from.connect((*address, 7000).into())?;
                let mut seen = String::new();
                stream.read_to_string(&mut seen)?;
                let seen: IpAddr = seen.parse()?;
                // Nodes have other addresses too; everyone else is seen as itself.
                assert!(
                    own.contains(&seen) || from.name() == "node-a",
                    "{} is seen as {seen}",
                    from.name()
                );
            }
        }
    }
    let service = places[0]
        .0
        .app("connect --to 10.96.0.10:80")?
        .failure(TIMEOUT)?;
    assert_eq!(service["stage"], "connect");
    Ok(())
}

#[test]
fn manifests_contain_what_was_declared() -> Result<()> {
    let mesh = two_nodes()?;
    let read = |node: &str, file: &str| -> Result<serde_json::Value> {
        let path = mesh.node(node).manifests().folder().join(file);
        serde_json::from_str(&std::fs::read_to_string(&path).context(path.display().to_string())?)
            .context("parsing")
    };
    let pod = read("node-a", "pod-default-web.json")?;
    assert_eq!(pod["status"]["podIP"], "10.77.2.2");
    assert_eq!(pod["status"]["podIPs"][1]["ip"], "fd77:2::2");
    assert_eq!(pod["spec"]["nodeName"], "node-b");
    let netns = mesh.pod("web").netns().path();
    assert_eq!(
        pod["metadata"]["annotations"]["auth-daemon.io/netns"],
        netns.display().to_string()
    );
    assert_eq!(
        read("node-b", "service-default-web.json")?["spec"]["clusterIPs"][1],
        "fd96::10"
    );

    let impostor =
        |pod: &mut serde_json::Value| pod["spec"]["serviceAccountName"] = "impostor".into();
    mesh.node("node-b")
        .manifests()
        .edit("Pod", "default", "web", impostor)?;
    assert_eq!(
        read("node-a", "pod-default-web.json")?["spec"]["serviceAccountName"],
        "web"
    );
    assert_eq!(
        read("node-b", "pod-default-web.json")?["spec"]["serviceAccountName"],
        "impostor"
    );
    mesh.manifests().remove("Pod", "default", "web")?;
    assert!(read("node-a", "pod-default-web.json").is_err());
    let files: Vec<_> = std::fs::read_dir(mesh.manifests().folder())?
        .flatten()
        .map(|file| file.file_name())
        .collect();
    assert!(
        files
            .iter()
            .all(|name| name.to_string_lossy().ends_with(".json")),
        "{files:?}"
    );
    Ok(())
}

#[test]
fn apps_behave_as_they_are_called() -> Result<()> {
    let mesh = two_nodes()?;
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let ip = web.ipv4();
    let run = |arguments: &str| client.app(arguments)?.success(TIMEOUT);
    let fail = |arguments: &str| client.app(arguments)?.failure(TIMEOUT);

    let mut echo = web.app("echo-server --port 7")?.listening()?;
    let seen = run(&format!(
        "connect --to {ip}:7 --source-port 5555 --send hello --shutdown --read"
    ))?;
    assert_eq!(
        (&seen["text"], &seen["peer"]),
        (&"hello".into(), &format!("{ip}:7").into())
    );
    let accepted = echo.event("accepted", TIMEOUT)?;
    assert_eq!(accepted["peer"], format!("{}:5555", client.ipv4()));
    assert_eq!(
        run(&format!("connect --to [{}]:7 --non-blocking", web.ipv6()))?["local"]
            .as_str()
            .map(|_| ()),
        Some(())
    );
    assert_eq!(
        fail(&format!("connect --to {ip}:9"))?["errno"],
        "ECONNREFUSED"
    );
    assert_eq!(
        fail(&format!("connect --to {ip}:9 --non-blocking"))?["errno"],
        "ECONNREFUSED"
    );
    assert_eq!(
        run(&format!("many --to {ip}:7 --connections 200"))?["failed"],
        0
    );
    assert_eq!(
        run(&format!("churn --to {ip}:7 --connections 500"))?["failed"],
        0
    );
    let set_up = run(&format!("set-up --to {ip}:7 --time 50"))?;
    assert!(set_up["p50"].as_f64() > Some(0.0), "{set_up}");
    assert_eq!(
        run(&format!("chat --to {ip}:7 --rounds 3 --interval 1"))?["rounds"],
        3
    );
    run(&format!("reset --to {ip}:7 --after 5"))?;
    let reset = eventually(TIMEOUT, "the server to see the reset", || {
        echo.events_of("closed")
            .into_iter()
            .find(|event| event["errno"] == "ECONNRESET")
    })?;
    assert_eq!(reset["stage"], "read");

    let _reset = web.app("reset --port 10 --after 3")?.listening()?;
    assert_eq!(
        fail(&format!("connect --to {ip}:10 --send abc --read"))?["errno"],
        "ECONNRESET"
    );
    let mut greeter = web
        .app("greeter --port 11 --greeting welcome")?
        .listening()?;
    assert_eq!(
        run(&format!("connect --to {ip}:11 --read-line --send thanks"))?["line"],
        "welcome"
    );
    assert_eq!(greeter.event("closed", TIMEOUT)?["text"], "thanks");

    let mut sink = web.app("sink --port 12")?.listening()?;
    assert_eq!(
        run(&format!("source --to {ip}:12 --bytes 10000001 --streams 3"))?["sent"],
        30_000_003
    );
    assert_eq!(sink.event("closed", TIMEOUT)?["received"], 10_000_001);
    let _source = web.app("source --port 13 --bytes 5000000")?.listening()?;
    let mut stall = client.app(&format!("stall --to {ip}:13 --seconds 0.2"))?;
    stall.event("stalled", TIMEOUT)?;
    assert_eq!(stall.success(TIMEOUT)?["received"], 5_000_000);
    let _bidi = web.app("bidi --port 14")?.listening()?;
    let both = run(&format!("bidi --to {ip}:14 --bytes 3000000 --streams 4"))?;
    assert_eq!(
        (&both["sent"], &both["received"]),
        (&12_000_000.into(), &12_000_000.into())
    );

    let _late = web
        .app("half-close --port 15 --after-end --message late")?
        .listening()?;
    let mut early = web
        .app("half-close --port 16 --message early")?
        .listening()?;
    assert_eq!(run(&format!("half-close --to {ip}:15"))?["received"], 4);
    assert_eq!(
        run(&format!(
            "half-close --to {ip}:16 --after-end --message answer"
        ))?["received"],
        5
    );
    assert_eq!(early.event("closed", TIMEOUT)?["text"], "answer");

    let mut udp = web.app("udp-echo --port 17")?.listening()?;
    assert_eq!(
        run(&format!("udp-send --to {ip}:17 --count 3"))?["count"],
        3
    );
    assert_eq!(udp.event("datagram", TIMEOUT)?["bytes"], 8);
    Ok(())
}

#[test]
fn processes_are_in_their_pods_cgroup_and_namespace() -> Result<()> {
    let mesh = two_nodes()?;
    let web = mesh.pod("web");
    let sleeper = web.spawn("sleep", ["1000"])?;
    let members = std::fs::read_to_string(web.cgroup().join("cgroup.procs"))?;
    assert_eq!(members.trim(), sleeper.pid().to_string());
    assert!(web.cgroup().starts_with(mesh.node("node-b").cgroup()));
    let inside = web.enter(|| std::fs::read_link("/proc/thread-self/ns/net"))??;
    assert_eq!(
        std::fs::read_link(format!("/proc/{}/ns/net", sleeper.pid()))?,
        inside
    );
    let _listener = web.listen("0.0.0.0:4000".parse()?)?;
    web.wait_listening(4000)?;
    assert_eq!(web.sockets()?.of(TcpState::Listen), 1);
    Ok(())
}

#[test]
fn iperf3_measures_between_pods() -> Result<()> {
    let mesh = two_nodes()?;
    let server = Iperf3::start(&mesh.pod("web"), 5201)?;
    let report = server.measure(
        &mesh.pod("client"),
        mesh.pod("web").ipv4().into(),
        &["-n", "10M"],
    )?;
    assert!(
        report["end"]["sum_received"]["bits_per_second"]
            .as_f64()
            .is_some_and(|speed| speed > 0.0)
    );
    Ok(())
}

#[test]
fn a_firewall_on_a_node_lets_one_port_through() -> Result<()> {
    let mesh = two_nodes()?;
    let web = mesh.pod("web");
    let _allowed = web.app("echo-server --port 80")?.listening()?;
    let _other = web.app("echo-server --port 81")?.listening()?;
    let firewall = Firewall::only_port(mesh.node("node-b"), 80)?;
    let client = mesh.pod("client");
    client
        .app(&format!("connect --to {}", web.at(80)))?
        .success(TIMEOUT)?;
    let refused = client
        .app(&format!("connect --to {} --timeout 300", web.at(81)))?
        .failure(TIMEOUT)?;
    assert_eq!(refused["stage"], "connect");
    assert!(firewall.packets("allowed")? > 0 && firewall.packets("dropped")? > 0);
    drop(firewall);
    client
        .app(&format!("connect --to {}", web.at(81)))?
        .success(TIMEOUT)?;
    Ok(())
}

#[test]
fn a_pod_is_recreated_in_the_middle_of_a_conversation() -> Result<()> {
    let mesh = two_nodes()?;
    let (client, old) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = old.app("echo-server --port 7")?.listening()?;
    let mut chat = client.app(&format!("chat --to {}", old.at(7)))?;
    chat.event("round", TIMEOUT)?;
    let inode =
        |pod: &mesh_tests::Pod| pod.enter(|| std::fs::read_link("/proc/thread-self/ns/net"));
    let before = inode(&old)??;
    let new = mesh.recreate_pod("web")?;
    assert_ne!(inode(&new)??, before);
    assert_eq!(
        (new.addresses(), new.netns().path()),
        (old.addresses(), old.netns().path())
    );
    let _echo = new.app("echo-server --port 7")?.listening()?;
    client
        .app(&format!("chat --rounds 1 --to {}", new.at(7)))?
        .success(TIMEOUT)?;

    mesh.remove_pod("web")?;
    assert!(
        !mesh
            .manifests()
            .folder()
            .join("pod-default-web.json")
            .exists()
    );
    let again = mesh.add_pod(PodSpec::new("web").on("node-b"))?;
    assert_ne!(again.uid(), new.uid());
    assert_ne!(again.ipv4(), new.ipv4());
    Ok(())
}

#[test]
fn a_node_that_is_reset_is_a_new_one_at_the_same_addresses() -> Result<()> {
    let mesh = two_nodes()?;
    let node = mesh.node("node-b");
    let namespace = || Ok::<_, anyhow::Error>(std::fs::metadata(node.netns().path())?.ino());
    let before = namespace()?;
    let mut of_node = node.spawn("sleep", ["1000"])?;
    let mut of_pod = mesh.pod("web").spawn("sleep", ["1000"])?;
    mesh.reset(node)?;
    of_node.wait(TIMEOUT)?;
    of_pod.wait(TIMEOUT)?;
    assert_ne!(namespace()?, before);
    let _server = node.app("echo-server --port 7")?.listening()?;
    for address in [IpAddr::from(node.ipv4()), node.ipv6().into()] {
        for from in [mesh.node("node-a").place(), mesh.outside()] {
            from.connect((address, 7).into())?;
        }
    }
    Ok(())
}

#[test]
fn nothing_is_left_after_the_end() -> Result<()> {
    let mesh = two_nodes()?;
    let id = mesh.id();
    let sleeper = mesh.pod("client").spawn("sleep", ["1000"])?;
    let nginx = Nginx::start(&mesh.pod("web"), 80, "x")?;
    std::fs::create_dir_all(mesh.node("node-a").pins().join("v2/maps"))?;
    assert!(traces(id)?.len() >= 3 + 2 + 2 + 3);
    drop(mesh);
    assert_eq!(traces(id)?, Vec::<std::path::PathBuf>::new());
    let mut sleeper = sleeper;
    sleeper.wait(TIMEOUT)?;
    drop(nginx);
    Ok(())
}

#[test]
fn nothing_is_left_after_a_panic() -> Result<()> {
    let mut id = None;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mesh = two_nodes().expect("a mesh");
        id = Some(mesh.id());
        let _nginx = Nginx::start(&mesh.pod("web"), 80, "x").expect("nginx");
        panic!("as a failing test does");
    }));
    assert!(outcome.is_err());
    assert_eq!(
        traces(id.context("there was a mesh")?)?,
        Vec::<std::path::PathBuf>::new()
    );
    Ok(())
}

#[test]
fn a_mesh_that_cannot_come_up_leaves_nothing_and_says_why() -> Result<()> {
    let error = Mesh::builder()
        .node("node-a")
        .pod(
            PodSpec::new("far")
                .address("10.77.1.1".parse()?)
                .address("fd77:1::77".parse()?),
        )
        .pod(PodSpec::new("lost").on("node-x"))
        .start()
        .expect_err("there is no node-x");
    let error = format!("{error:#}");
    let (id, why) = error
        .strip_prefix("bringing up mesh ")
        .and_then(|rest| rest.split_once(": "))
        .with_context(|| error.clone())?;
    assert_eq!(why, "adding pod lost: there is no node node-x");
    assert_eq!(
        traces(id.parse().expect("an id"))?,
        Vec::<std::path::PathBuf>::new()
    );
    Ok(())
}

#[test]
fn two_meshes_coexist() -> Result<()> {
    let (one, other) = (two_nodes()?, two_nodes()?);
    let _one = Nginx::start(&one.pod("web"), 80, "one")?;
    let _other = Nginx::start(&other.pod("web"), 80, "other")?;
    let url = format!("http://{}/", one.pod("web").at(80));
    assert_eq!(one.pod("web").addresses(), other.pod("web").addresses());
    assert_eq!(
        one.pod("client").run("curl", ["-sS", &url])?.ok()?.stdout,
        "one"
    );
    assert_eq!(
        other.pod("client").run("curl", ["-sS", &url])?.ok()?.stdout,
        "other"
    );
    drop(one);
    assert_eq!(
        other.pod("client").run("curl", ["-sS", &url])?.ok()?.stdout,
        "other"
    );
    Ok(())
}

#[test]
fn leftovers_of_a_killed_run_are_removed() -> Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--exact", "holds_a_mesh", "--ignored", "--nocapture"])
        .env("HOLDS_A_MESH", "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let output = BufReader::new(child.stdout.take().context("stdout is piped")?);
    let id = output
        .lines()
        .map_while(Result::ok)
        .find_map(|line| Some(line.split_once("mesh=")?.1.to_owned()));
    child.kill()?;
    child.wait()?;
    let id: MeshId = id
        .context("the other run reported its mesh")?
        .parse()
        .expect("an id");
    // Another test of this run may have been quicker to remove it.
    remove_dead()?;
    assert_eq!(traces(id)?, Vec::<std::path::PathBuf>::new());
    Ok(())
}

/// Not a test: the run that [`leftovers_of_a_killed_run_are_removed`] kills.
#[test]
#[ignore = "it is killed by another test"]
fn holds_a_mesh() -> Result<()> {
    if std::env::var_os("HOLDS_A_MESH").is_some() {
        let mesh = two_nodes()?;
        let _nginx = Nginx::start(&mesh.pod("web"), 80, "x")?;
        println!("\nmesh={}", mesh.id());
        std::thread::sleep(Duration::from_secs(600));
    }
    Ok(())
}

fn two_nodes() -> Result<Mesh> {
    Mesh::builder()
        .node("node-a")
        .node("node-b")
        .pod(
            PodSpec::new("client")
                .on("node-a")
                .service_account("client"),
        )
        .pod(
            PodSpec::new("web")
                .on("node-b")
                .service_account("web")
                .label("app", "web")
                .port("http", 8080),
        )
        .pod(
            PodSpec::new("web")
                .on("node-a")
                .namespace("other")
                .service_account("web"),
        )
        .service(
            ServiceSpec::new("web")
                .selector("app", "web")
                .address("10.96.0.10")
                .address("fd96::10")
                .named_port(80, "http"),
        )
        .start()
}

const MARKER: &str = "marker-7f3a";
