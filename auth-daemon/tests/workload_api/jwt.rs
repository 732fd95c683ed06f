//! JWT-SVIDs by the Workload API.

use std::sync::Arc;

use auth_jwt::{Audience, JwtKeys, SigningKey};
use auth_mesh::{Identity, TrustDomain};
use auth_tunnel::tls::trust::{ForeignBundles, Reason, TrustBundle};
use auth_workload_api::{
    JwtIssuer,
    api::{
        JwtBundlesRequest, JwtsvidRequest, ValidateJwtsvidRequest, ValidateJwtsvidResponse,
        spiffe_workload_api_client::SpiffeWorkloadApiClient,
    },
};
use tonic::{Code, Status, transport::Channel};

use super::{LIFETIME, Stage, identity, next, with_metadata};

type Client = SpiffeWorkloadApiClient<Channel>;

/// An authority of JWT-SVIDs.
#[derive(Debug)]
struct Authority(SigningKey);

impl Authority {
    fn new() -> Arc<Self> {
        let pem = rcgen::KeyPair::generate().unwrap().serialize_pem();
        Arc::new(Self(SigningKey::from_pem(&pem).unwrap()))
    }

    fn keys(&self) -> JwtKeys {
        [&self.0].into_iter().collect()
    }

    fn sign(&self, identity: &Identity, audience: &Audience) -> String {
        let now = jsonwebtoken::get_current_timestamp();
        self.0.sign(identity, audience, now, now + 300).unwrap()
    }
}

#[tonic::async_trait]
impl JwtIssuer for Authority {
    async fn issue(&self, identity: &Identity, audience: &Audience) -> Result<String, Status> {
        Ok(self.sign(identity, audience))
    }
}

/// The API of a workload whose CA is this authority.
async fn stage(authority: &Arc<Authority>) -> Stage {
    let jwts = authority.clone();
    let stage = Stage::set_with(LIFETIME, |served| served.jwts = jwts).await;
    stage.change_trust(|trust| trust.bundle.jwt_keys = authority.keys());
    stage
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

async fn fetch(client: &mut Client, audience: &[&str], id: &str) -> Result<String, Status> {
    let request = JwtsvidRequest {
        audience: names(audience),
        spiffe_id: id.to_owned(),
    };
    let answer = client.fetch_jwtsvid(with_metadata(request)).await?;
    let [svid] = &answer.into_inner().svids[..] else {
        panic!("not one token");
    };
    assert_eq!(svid.spiffe_id, identity().as_str());
    Ok(svid.svid.clone())
}

async fn validate(
    client: &mut Client,
    audience: &str,
    token: &str,
) -> Result<ValidateJwtsvidResponse, Status> {
    let request = ValidateJwtsvidRequest {
        audience: audience.to_owned(),
        svid: token.to_owned(),
    };
    let answer = client.validate_jwtsvid(with_metadata(request)).await?;
    Ok(answer.into_inner())
}

/// Fails unless the request is refused as invalid, for this reason.
async fn refused(client: &mut Client, audience: &str, token: &str, why: &str) {
    let refused = validate(client, audience, token).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.message().contains(why), "{refused}");
}

#[tokio::test]
async fn a_workload_gets_tokens_of_its_own_for_the_audiences_that_it_names() {
    let authority = Authority::new();
    let stage = stage(&authority).await;
    let mut client = stage.client().await;
    for id in ["", identity().as_str()] {
        let token = fetch(&mut client, &["db", "queue"], id).await.unwrap();
        let valid = validate(&mut client, "queue", &token).await.unwrap();
        assert_eq!(valid.spiffe_id, identity().as_str());
        let claims = format!("{:?}", valid.claims.unwrap());
        assert!(claims.contains("db") && claims.contains("iat"), "{claims}");
    }
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    let denied = fetch(&mut client, &["db"], other).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied, "{denied}");
    let long = "x".repeat(257);
    for bad in [&[][..], &["a"; 9], &[""], &[&long]] {
        let refused = fetch(&mut client, bad, "").await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{bad:?}: {refused}");
    }
    let bare = client.fetch_jwtsvid(JwtsvidRequest::default()).await;
    assert_eq!(bare.unwrap_err().code(), Code::InvalidArgument);
    stage.change_trust(|trust| {
        let identities = &mut trust.revoked.identities;
        identities.insert(identity(), Reason::KeyCompromise);
    });
    let revoked = fetch(&mut client, &["db"], "").await.unwrap_err();
    assert_eq!(revoked.code(), Code::PermissionDenied, "{revoked}");
}

#[tokio::test]
async fn each_trust_domain_vouches_for_its_own_names_alone() {
    let (own, far) = (Authority::new(), Authority::new());
    let stage = stage(&own).await;
    let mut client = stage.client().await;
    let db = Audience::try_from(names(&["db"])).unwrap();
    let domain: TrustDomain = "far.example".parse().unwrap();
    let foreign = domain.identity("shop", "web").unwrap();
    let token = far.sign(&foreign, &db);
    refused(&mut client, "db", &token, "no key that verifies").await;
    let mut bundles = ForeignBundles::default();
    bundles.insert(TrustBundle {
        jwt_keys: far.keys(),
        ..TrustBundle::of_roots(domain, vec![])
    });
    stage.ca.trust().publish_foreign(bundles);
    let valid = validate(&mut client, "db", &token).await.unwrap();
    assert_eq!(valid.spiffe_id, foreign.as_str());
    refused(&mut client, "queue", &token, "another audience").await;
    refused(&mut client, "", &token, "no audience").await;
    // Each with the other's key.
    for (authority, identity) in [(&far, &identity()), (&own, &foreign)] {
        let forged = authority.sign(identity, &db);
        refused(&mut client, "db", &forged, "not signed with a key").await;
    }
    refused(&mut client, "db", &"x".repeat(9000), "longer than").await;
    let own = own.sign(&identity(), &db);
    validate(&mut client, "db", &own).await.unwrap();
    stage.change_trust(|trust| {
        let identities = &mut trust.revoked.identities;
        identities.insert(identity(), Reason::KeyCompromise);
    });
    refused(&mut client, "db", &own, "is revoked").await;
    stage.ca.trust().publish_foreign(ForeignBundles::default());
    refused(&mut client, "db", &token, "no key that verifies").await;
}

#[tokio::test]
async fn streams_follow_new_keys() {
    let (first, second, far) = (Authority::new(), Authority::new(), Authority::new());
    let stage = stage(&first).await;
    let mut client = stage.client().await;
    let opened = client.fetch_jwt_bundles(with_metadata(JwtBundlesRequest {}));
    let mut bundles = opened.await.unwrap().into_inner();
    let own = |keys: &JwtKeys| {
        (
            "spiffe://cluster.local".to_owned(),
            keys.to_json().into_bytes(),
        )
    };
    let sent = next(&mut bundles).await.unwrap().bundles;
    assert_eq!(sent, [own(&first.keys())].into());
    let both: JwtKeys = [&first.0, &second.0].into_iter().collect();
    stage.change_trust(|trust| trust.bundle.jwt_keys = both.clone());
    let sent = next(&mut bundles).await.unwrap().bundles;
    assert_eq!(sent, [own(&both)].into());
    let mut foreign = ForeignBundles::default();
    foreign.insert(TrustBundle {
        jwt_keys: far.keys(),
        ..TrustBundle::of_roots("far.example".parse().unwrap(), vec![])
    });
    stage.ca.trust().publish_foreign(foreign);
    let sent = next(&mut bundles).await.unwrap().bundles;
    assert_eq!(sent.len(), 2);
    let far = far.keys().to_json().into_bytes();
    assert_eq!(sent["spiffe://far.example"], far);
}

#[tokio::test]
async fn without_a_ca_that_issues_tokens_the_answers_say_so() {
    let stage = Stage::set(LIFETIME).await;
    let mut client = stage.client().await;
    let none = fetch(&mut client, &["db"], "").await.unwrap_err();
    assert_eq!(none.code(), Code::Unimplemented);
    assert!(none.message().contains("istiod"), "{none}");
    let opened = client.fetch_jwt_bundles(with_metadata(JwtBundlesRequest {}));
    let none = opened.await.err().unwrap();
    assert_eq!(none.code(), Code::Unavailable);
    assert!(none.message().contains("istiod"), "{none}");
}
