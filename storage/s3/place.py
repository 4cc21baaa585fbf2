"""Who uses which bucket where: what a remembered fact about an S3 store holds for."""

import hashlib
import ipaddress
import json
from urllib.parse import parse_qsl, urlsplit

import botocore.exceptions as boto_errors
import botocore.session


def identity(url: str) -> str | None:
    """Return a digest of the endpoint, the bucket and the user of a store's url.

    None if nothing should be remembered of it: a server on this machine is another one tomorrow, and without
    credentials there is nobody to remember it for. The prefix does not matter: a bucket is of one kind.
    """
    parts = urlsplit(url)
    if parts.scheme != "s3":
        return None
    options = dict(parse_qsl(parts.query))
    try:
        session = botocore.session.Session()
        region = options.get("region") or session.get_config_variable("region") or "us-east-1"
        # The environment may name an endpoint too, in several ways: the client knows them all.
        client = session.create_client("s3", endpoint_url=options.get("endpoint"), region_name=region)
        endpoint = str(client.meta.endpoint_url)
        credentials = session.get_credentials()
        frozen = credentials and credentials.get_frozen_credentials()
    except (boto_errors.BotoCoreError, ValueError):
        return None  # whoever opens the store says what is wrong
    if not frozen or _on_this_machine(urlsplit(endpoint).hostname or ""):
        return None
    named = json.dumps([endpoint, parts.netloc, str(frozen.access_key)])
    return hashlib.sha256(named.encode()).hexdigest()


def _on_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
