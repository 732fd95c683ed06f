//! JWT-SVIDs from the CA: who gets which, and what a daemon makes of them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use auth_ca::authority::Target;
use auth_ca_api::auth::{IssueJwtRequest, jwt_service_client::JwtServiceClient};
use auth_daemon::issuer::{CaClient, Certificates, Issuer};
use auth_jwt::{Audience, JwtSvid};
use auth_mesh::Identity;
use auth_tunnel::tls::trust::Reason;
use tonic::{Code, Request, Status, transport::Channel};

use crate::harness::*;

/// Asks for a token of an identity.
pub(crate) async fn ask(
    channel: &Channel,
    bearer: Option<String>,
    identity: &str,
    audience: &[&str],
) -> Result<String, Status> {
    let mut request = Request::new(IssueJwtRequest {
        identity: identity.to_owned(),
        audience: audience.iter().map(ToString::to_string).collect(),
    });
    if let Some(bearer) = bearer {
        let value = format!("Bearer {bearer}").parse().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    let answer = JwtServiceClient::new(channel.clone())
        .issue(request)
        .await?;
    Ok(answer.into_inner().token)
}

fn of(ca: &Ca, token: &str) -> String {
    let keys = ca.authority.published().borrow().jwt_keys.clone();
    let svid = JwtSvid::validate(token, "db", |_| Some(keys)).unwrap();
    svid.id.as_str().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_get_tokens_of_the_identities_that_they_get_certificates_of() {
    let ca = Ca::start().await;
    let caller = ca.caller().await;
    let (web, api) = (identity("web"), identity("api"));
    let node = || Some(token("a"));
    let pod = || Some(ca.issuer.token("web", "a", |_| {}));
    for (bearer, asked) in [(node(), web.as_str()), (pod(), ""), (pod(), web.as_str())] {
        let token = ask(&caller, bearer, asked, &["db", "queue"]).await.unwrap();
        assert_eq!(of(&ca, &token), web.as_str());
    }
    let person = Some(ca.issuer.person("alice@example.com"));
    for (what, bearer, asked, audience, code) in [
        (
            "no caller",
            None,
            web.as_str(),
            &["db"][..],
            Code::Unauthenticated,
        ),
        (
            "a pod elsewhere",
            node(),
            api.as_str(),
            &["db"],
            Code::PermissionDenied,
        ),
        (
            "another identity",
            pod(),
            api.as_str(),
            &["db"],
            Code::PermissionDenied,
        ),
        (
            "a person",
            person,
            web.as_str(),
            &["db"],
            Code::PermissionDenied,
        ),
        (
            "a node of itself",
            node(),
            "",
            &["db"],
            Code::InvalidArgument,
        ),
        ("no identity", node(), "web", &["db"], Code::InvalidArgument),
        (
            "no audience",
            node(),
            web.as_str(),
            &[],
            Code::InvalidArgument,
        ),
        (
            "many",
            node(),
            web.as_str(),
            &["db"; 9],
            Code::InvalidArgument,
        ),
    ] {
        let refused = ask(&caller, bearer, asked, audience).await.unwrap_err();
        assert_eq!(refused.code(), code, "{what}: {refused}");
    }
    ca.run_pods([]);
    let gone = ask(&caller, node(), web.as_str(), &["db"]).await;
    assert_eq!(gone.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_certificates_count_for_one_quota_of_their_identity() {
    let ca = Ca::start().await;
    let caller = ca.caller().await;
    let web = identity("web");
    let start = Instant::now();
    let mut issued = 0;
    let refused = loop {
        if let Err(refused) = ask(&caller, Some(token("a")), web.as_str(), &["db"]).await {
            break refused;
        }
        if let Err(refused) = Ask::good().send(&caller).await {
            break refused;
        }
        issued += 2;
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    // Tokens and certificates together.
    let most = 31 + 2 * start.elapsed().as_secs();
    assert!(issued <= most, "{issued} of {most}");
}

fn daemon(ca: &Ca) -> Certificates {
    let client = CaClient::start(ca.server("a"), domain(), Duration::from_secs(3600));
    Certificates::new(Arc::new(client.unwrap()))
}

async fn token_of(
    certificates: &Certificates,
    identity: &Identity,
    audience: &str,
) -> Result<String, Status> {
    let app = certificates.for_app(identity, Duration::from_secs(3600));
    let audience = Audience::try_from(vec![audience.to_owned()]).unwrap();
    app.served.jwts.issue(identity, &audience).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_keeps_tokens_and_asks_no_more_than_it_may() {
    let ca = Ca::start().await;
    let daemon = daemon(&ca);
    let web = identity("web");
    let first = token_of(&daemon, &web, "db").await.unwrap();
    assert_eq!(of(&ca, &first), web.as_str());
    for _ in 0..100 {
        let again = token_of(&daemon, &web, "db").await.unwrap();
        assert_eq!(again, first, "for another pod, too");
    }
    assert_eq!(daemon.trust().jwt_keys().len(), 1);
    let mut audiences = (0..).map(|number| number.to_string());
    let refused = loop {
        let audience = audiences.next().unwrap();
        if let Err(refused) = token_of(&daemon, &web, &audience).await {
            break refused;
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("fewer audiences"), "{refused}");
    assert_eq!(token_of(&daemon, &web, "db").await.unwrap(), first);
    // There is a certificate for the tunnels all the same.
    let tunnels = daemon.acquire(&web).obtain(Duration::from_secs(10)).await;
    assert!(tunnels.is_some());
    let elsewhere = token_of(&daemon, &identity("api"), "db").await;
    let refused = elsewhere.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("no pod"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_identity_gets_no_token() {
    let ca = Ca::start().await;
    let client = CaClient::start(ca.server("a"), domain(), Duration::from_secs(3600)).unwrap();
    let audience = Audience::try_from(vec!["db".to_owned()]).unwrap();
    let web = identity("web");
    client.issue_jwt(&web, &audience).await.unwrap();
    let target = Target::Identity(web.clone());
    ca.authority
        .revoke(target, Reason::KeyCompromise)
        .await
        .unwrap();
    let refused = client.issue_jwt(&web, &audience).await.unwrap_err();
    assert!(refused.why.contains("is revoked"), "{refused}");
}
