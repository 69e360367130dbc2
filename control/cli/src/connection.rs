//! The connection to the control plane: gRPC over TLS as who the kubeconfig says, perhaps for somebody else
//! (`--as`), and the few calls that verbs share.

use crate::Global;
use crate::failure::{Failure, chain};
use crate::kubeconfig::{self, Access};
use gantry_api::kinds::Kind;
use gantry_api::proto::access_client::AccessClient;
use gantry_api::proto::images_client::ImagesClient;
use gantry_api::proto::objects_client::ObjectsClient;
use gantry_api::proto::pods_client::PodsClient;
use gantry_api::proto::stats_client::StatsClient;
use gantry_api::proto::store_client::StoreClient;
use gantry_api::proto::{
    DeleteRequest, GetRequest, ListRequest, ObjectKey, PatchRequest, TableReply, WriteReply,
    patch_request,
};
use serde_json::Value;
use std::time::Duration;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A list of 10,000 pods with all their fields.
const MESSAGE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// The connection with what goes along with every request.
pub(crate) type Wire = InterceptedService<Channel, Caller>;

/// Who asks, as far as the connection's certificate does not say it.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// Names and values of the metadata.
    metadata: Vec<(&'static str, String)>,
}

impl Caller {
    /// As the kubeconfig says, but for what the flags say.
    fn new(access: &Access, global: &Global) -> Self {
        let token = access.token.iter();
        let token = token.map(|token| ("authorization", format!("Bearer {token}")));
        let other = global.impersonated().or(access.impersonated.clone());
        let other = other.into_iter().flat_map(|other| {
            let groups = other.groups.into_iter();
            let groups = groups.map(|group| ("impersonate-group", group));
            std::iter::once(("impersonate-user", other.user)).chain(groups)
        });
        Self {
            metadata: token.chain(other).collect(),
        }
    }
}

impl Interceptor for Caller {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> Result<tonic::Request<()>, tonic::Status> {
        for (name, value) in &self.metadata {
            // Left out, it would be somebody else who asks.
            let value = value.parse::<AsciiMetadataValue>().map_err(|_| {
                let text = format!("{name}: a name or token that is not plain text cannot be sent");
                tonic::Status::invalid_argument(text)
            })?;
            request.metadata_mut().append(*name, value);
        }
        Ok(request)
    }
}

/// A connected client and where it works.
pub(crate) struct Session {
    pub(crate) objects: ObjectsClient<Wire>,
    pub(crate) pods: PodsClient<Wire>,
    pub(crate) stats: StatsClient<Wire>,
    pub(crate) images: ImagesClient<Wire>,
    pub(crate) access: AccessClient<Wire>,
    pub(crate) store: StoreClient<Wire>,
    /// `-n`, or the context's namespace.
    pub(crate) namespace: String,
    /// Whether `-n` was given.
    pub(crate) namespace_given: bool,
    pub(crate) server: String,
    /// The cluster's CA as the kubeconfig has it, PEM.
    pub(crate) authority: Option<Vec<u8>>,
    request_timeout: Option<Duration>,
}

impl Session {
    pub(crate) async fn open(global: &Global) -> Result<Self, Failure> {
        let environment = std::env::var("KUBECONFIG").ok();
        let home = std::env::var("HOME").ok();
        let paths = kubeconfig::locations(
            global.kubeconfig.as_deref(),
            environment.as_deref(),
            home.as_deref(),
        );
        let mut access = kubeconfig::load(&paths, global.context.as_deref())?;
        let channel = connect(&mut access).await?;
        Ok(Self::over(channel, &access, global))
    }

    pub(crate) fn over(channel: Channel, access: &Access, global: &Global) -> Self {
        let channel = InterceptedService::new(channel, Caller::new(access, global));
        let namespace = global.namespace.clone().filter(|n| !n.is_empty());
        Self {
            objects: ObjectsClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
            pods: PodsClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            stats: StatsClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            access: AccessClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            store: StoreClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            images: ImagesClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
            namespace_given: namespace.is_some(),
            namespace: namespace.unwrap_or_else(|| access.namespace.clone()),
            server: access.server.clone(),
            authority: access.authority.clone(),
            request_timeout: Some(global.request_timeout).filter(|t| !t.is_zero()),
        }
    }

    /// A unary request with the deadline that `--request-timeout` asks for.
    pub(crate) fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(timeout) = self.request_timeout {
            request.set_timeout(timeout);
        }
        request
    }

    /// The key of an object in the session's namespace.
    pub(crate) fn key(&self, kind: &Kind, name: &str) -> ObjectKey {
        key(kind, &self.namespace, name)
    }

    pub(crate) async fn get(&self, key: ObjectKey) -> Result<Value, Failure> {
        let request = self.request(GetRequest { key: Some(key) });
        let reply = self.objects.clone().get(request).await?.into_inner();
        parse(&reply.json)
    }

    /// As [`Session::get`], but a missing object is no failure.
    pub(crate) async fn find(&self, key: ObjectKey) -> Result<Option<Value>, Failure> {
        match self.get(key).await {
            Ok(object) => Ok(Some(object)),
            Err(failure) if failure.reason() == Some(gantry_api::status::Reason::NotFound) => {
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }

    /// The objects and the revision at which they were read.
    pub(crate) async fn list(&self, request: ListRequest) -> Result<(Vec<Value>, String), Failure> {
        let reply = self
            .objects
            .clone()
            .list(self.request(request))
            .await?
            .into_inner();
        let items: Result<Vec<Value>, Failure> = reply.items.iter().map(|i| parse(i)).collect();
        Ok((items?, reply.resource_version))
    }

    pub(crate) async fn table(&self, request: ListRequest) -> Result<TableReply, Failure> {
        Ok(self
            .objects
            .clone()
            .table(self.request(request))
            .await?
            .into_inner())
    }

    pub(crate) async fn patch(
        &self,
        key: ObjectKey,
        patch_type: patch_request::Type,
        patch: &Value,
    ) -> Result<Value, Failure> {
        self.patch_part(key, patch_type, patch, "").await
    }

    /// Patches a subresource.
    pub(crate) async fn patch_part(
        &self,
        key: ObjectKey,
        patch_type: patch_request::Type,
        patch: &Value,
        subresource: &str,
    ) -> Result<Value, Failure> {
        let request = PatchRequest {
            key: Some(key),
            r#type: patch_type.into(),
            patch: patch.to_string().into(),
            dry_run: false,
            field_manager: "gantry".to_owned(),
            subresource: subresource.to_owned(),
        };
        let reply = self
            .objects
            .clone()
            .patch(self.request(request))
            .await?
            .into_inner();
        warn(&reply);
        parse(&reply.json)
    }

    pub(crate) async fn delete(&self, request: DeleteRequest) -> Result<WriteReply, Failure> {
        Ok(self
            .objects
            .clone()
            .delete(self.request(request))
            .await?
            .into_inner())
    }
}

/// A key in a given namespace (ignored for cluster-scoped kinds).
pub(crate) fn key(kind: &Kind, namespace: &str, name: &str) -> ObjectKey {
    ObjectKey {
        group: kind.group.to_owned(),
        plural: kind.plural.to_owned(),
        namespace: if kind.namespaced {
            namespace.to_owned()
        } else {
            String::new()
        },
        name: name.to_owned(),
    }
}

/// The server's warnings, as kubectl prints them.
pub(crate) fn warn(reply: &WriteReply) {
    for warning in &reply.warnings {
        eprintln!("Warning: {warning}");
    }
}

pub(crate) fn parse(json: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(json)
        .map_err(|e| Failure::local(format!("the server sent an object that is no JSON: {e}")))
}

/// To the first server that answers; the kubeconfig may name several control planes of one cluster, with commas
/// between.
async fn connect(access: &mut Access) -> Result<Channel, Failure> {
    let servers = access.server.clone();
    let mut failures = Vec::new();
    for server in servers.split(',').map(str::trim) {
        match connect_to(server.trim_end_matches('/'), access).await {
            Ok(channel) => {
                server.clone_into(&mut access.server);
                return Ok(channel);
            }
            Err(Failure::Connection(text)) => failures.push(text),
            Err(failure) => return Err(failure),
        }
    }
    Err(Failure::Connection(failures.join("\n")))
}

async fn connect_to(server: &str, access: &Access) -> Result<Channel, Failure> {
    let malformed = |detail: &dyn std::fmt::Display| {
        Failure::local(format!(
            "the kubeconfig's server {server:?} is no URL: {detail}"
        ))
    };
    let uri: http::Uri = server.parse().map_err(|e| malformed(&e))?;
    if uri.scheme_str() != Some("https") {
        return Err(malformed(&"it must start with https://"));
    }
    let host = uri
        .host()
        .ok_or_else(|| malformed(&"it has no host"))?
        .to_owned();
    let address = format!("{host}:{}", uri.port_u16().unwrap_or(6443));
    let mut tls = ClientTlsConfig::new();
    if let Some(authority) = &access.authority {
        tls = tls.ca_certificate(Certificate::from_pem(authority));
    }
    if let (Some(certificate), Some(key)) = (&access.certificate, &access.key) {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    if let Some(name) = &access.server_name {
        tls = tls.domain_name(name.clone());
    }
    let endpoint = Endpoint::from_shared(format!("https://{address}"))
        .map_err(|e| malformed(&e))?
        .tls_config(tls)
        .map_err(|e| Failure::local(format!("the kubeconfig's credentials: {}", chain(&e))))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    match tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await {
        Ok(connected) => connected.map_err(|error| refused(&address, &error)),
        Err(_) => Err(Failure::Connection(format!(
            "Unable to connect to the server {address}: no answer in {CONNECT_TIMEOUT:?}"
        ))),
    }
}

fn refused(address: &str, error: &tonic::transport::Error) -> Failure {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        let kind = error
            .downcast_ref::<std::io::Error>()
            .map(std::io::Error::kind);
        if kind == Some(std::io::ErrorKind::ConnectionRefused) {
            return Failure::Connection(format!(
                "The connection to the server {address} was refused - is gantry-control running?"
            ));
        }
        source = error.source();
    }
    Failure::Connection(format!(
        "Unable to connect to the server {address}: {}",
        chain(error)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubeconfig::Impersonated;

    fn access() -> Access {
        Access {
            token: Some("t0ken".to_owned()),
            impersonated: Some(Impersonated {
                user: "jane".to_owned(),
                groups: vec!["dev".to_owned(), "ops".to_owned()],
            }),
            ..Access::default()
        }
    }

    fn sent(access: &Access, global: &Global) -> Result<Vec<String>, tonic::Status> {
        let mut caller = Caller::new(access, global);
        let request = caller.call(tonic::Request::new(()))?;
        let all = |name: &str| -> Vec<String> {
            let values = request.metadata().get_all(name).iter();
            let values = values.map(|value| value.to_str().unwrap_or("?").to_owned());
            values.collect()
        };
        let names = ["authorization", "impersonate-user", "impersonate-group"];
        Ok(names.into_iter().flat_map(all).collect())
    }

    #[test]
    fn every_request_says_who_asks_and_as_whom() {
        let as_jane = sent(&access(), &Global::default()).unwrap();
        assert_eq!(as_jane, ["Bearer t0ken", "jane", "dev", "ops"]);
        // Who is named on the command line has none of the other one's groups.
        let global = Global {
            as_user: Some("joe".to_owned()),
            ..Global::default()
        };
        assert_eq!(sent(&access(), &global).unwrap(), ["Bearer t0ken", "joe"]);
        let nobody = sent(&Access::default(), &Global::default()).unwrap();
        assert!(nobody.is_empty());
    }

    #[test]
    fn a_name_that_cannot_be_sent_ends_the_request() {
        let global = Global {
            as_user: Some("a\nb".to_owned()),
            ..Global::default()
        };
        assert!(sent(&access(), &global).is_err());
    }
}
