//! Rotation of a real istiod's root, as its daemons follow it.

use std::time::Duration;

use auth_daemon::issuer::{CaClient, Issuer as _};
use mesh_tests::{IstioCa, IstiodOptions};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use crate::{
    eventually,
    istiod::{NODE, OWN, Stage, identity, request},
};

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_follows_istiod_through_a_rotation_of_its_root() {
    let test = "the_daemon_follows_istiod_through_a_rotation_of_its_root";
    let mut ca = None;
    let stage = Stage::set_with(test, |folder| {
        let made = IstioCa::make(&folder.join("cacerts")).unwrap();
        let folder = made.folder().to_owned();
        ca = Some(made);
        IstiodOptions {
            ca: Some(folder),
            ..IstiodOptions::default()
        }
    });
    let (Some(stage), Some(mut ca)) = (stage, ca) else {
        return;
    };
    stage.cluster.namespace("shop").unwrap();
    stage.pod("web", NODE, "10.1.0.1");
    let domain = "cluster.local".parse().unwrap();
    let daemon = CaClient::start(stage.server.clone(), domain, Duration::from_secs(3600)).unwrap();
    let csr = request();
    let (mut roots, mut signer) = (1, "first");
    for phase in ["before", "both are trusted", "the new one signs", "after"] {
        match phase {
            "both are trusted" => {
                ca.add_root().unwrap();
                roots = 2;
            }
            "the new one signs" => {
                ca.sign_with_new_root().unwrap();
                signer = "next";
            }
            "after" => {
                ca.remove_old_root().unwrap();
                roots = 1;
            }
            _ => {}
        }
        eventually(phase, async || {
            // As a kubelet would, from the ConfigMap that istiod publishes.
            stage.istiod.root_file(&stage.cluster, OWN).unwrap();
            (daemon.trust().current().bundle.roots.len() == roots).then_some(())
        })
        .await;
        // istiod itself has a certificate of the signer: the daemon reaches it in each phase.
        eventually(phase, async || {
            let issued = daemon.issue(&identity("web"), &csr).await.ok()?;
            let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).ok()?;
            leaf.issuer().to_string().contains(signer).then_some(())
        })
        .await;
    }
}
