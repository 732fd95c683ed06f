//! JWT-SVIDs (SPIFFE Workload API §6).

use std::{collections::BTreeMap, fmt};

use auth_jwt::{Audience, JwtSvid};
use auth_mesh::Identity;
use auth_tunnel::tls::trust::TrustStore;
use serde_json::{Map, Value};
use tonic::Status;

use crate::api::{
    Jwtsvid, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest, ValidateJwtsvidResponse,
};
use crate::service::{Served, id};

/// Where the tokens of workloads come from.
#[tonic::async_trait]
pub trait JwtIssuer: Send + Sync + fmt::Debug {
    /// Returns a JWT-SVID of `identity` for `audience`, in compact form, or why there is none.
    async fn issue(&self, identity: &Identity, audience: &Audience) -> Result<String, Status>;
}

pub(crate) async fn fetch(
    served: &Served,
    request: JwtsvidRequest,
) -> Result<JwtsvidResponse, Status> {
    let audience = Audience::try_from(request.audience);
    let audience = audience.map_err(|error| Status::invalid_argument(error.to_string()))?;
    let identity = &served.identity;
    if !["", identity.as_str()].contains(&&*request.spiffe_id) {
        return Err(Status::permission_denied(format!(
            "the workload is {identity}: request no other identity, or leave the SPIFFE ID empty"
        )));
    }
    let revoked = served.trust.current().revoked.check_identity(identity);
    revoked.map_err(|revoked| Status::permission_denied(revoked.to_string()))?;
    let token = served.jwts.issue(identity, &audience).await?;
    Ok(JwtsvidResponse {
        svids: vec![Jwtsvid {
            spiffe_id: identity.to_string(),
            svid: token,
        }],
    })
}

/// Returns the keys of all trust domains, as JWK Sets.
pub(crate) fn bundles(trust: &TrustStore) -> BTreeMap<String, Vec<u8>> {
    let keys = trust.jwt_keys().into_iter();
    keys.map(|(name, keys)| (id(&name), keys.to_json().into_bytes()))
        .collect()
}

pub(crate) fn validate(
    trust: &TrustStore,
    request: &ValidateJwtsvidRequest,
) -> Result<ValidateJwtsvidResponse, Status> {
    if request.audience.is_empty() {
        return Err(Status::invalid_argument(
            "no audience is given: name the recipient that the token must name",
        ));
    }
    let svid = JwtSvid::validate(&request.svid, &request.audience, |domain| {
        trust.jwt_keys_of(domain.as_str())
    })
    .map_err(|untrusted| Status::invalid_argument(untrusted.to_string()))?;
    // The identities of foreign trust domains are not in the list.
    if let Ok(identity) = svid.id.as_str().parse::<Identity>() {
        let revoked = trust.current().revoked.check_identity(&identity);
        revoked.map_err(|revoked| Status::invalid_argument(revoked.to_string()))?;
    }
    Ok(ValidateJwtsvidResponse {
        spiffe_id: svid.id.as_str().to_owned(),
        claims: Some(fields(svid.claims)),
    })
}

/// Converts claims to protobuf. The recursion is bounded: serde_json reads at most 128 levels.
fn fields(claims: Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct {
        fields: claims
            .into_iter()
            .map(|(name, claim)| (name, value(claim)))
            .collect(),
    }
}

fn value(claim: Value) -> prost_types::Value {
    use prost_types::value::Kind;
    let kind = match claim {
        Value::Null => Kind::NullValue(0),
        Value::Bool(bool) => Kind::BoolValue(bool),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(values) => Kind::ListValue(prost_types::ListValue {
            values: values.into_iter().map(value).collect(),
        }),
        Value::Object(object) => Kind::StructValue(fields(object)),
    };
    prost_types::Value { kind: Some(kind) }
}
