-- Health of a ModelInstance for Argo CD, from the conditions Ready, Reconciling and Stalled.
-- docs/gitops.md says where it goes.
local health = {status = "Progressing", message = "nothing was observed yet"}
if obj.status == nil or obj.status.conditions == nil then
  return health
end
if obj.status.observedGeneration ~= obj.metadata.generation then
  health.message = "the newest spec was not observed yet"
  return health
end

local conditions = {}
for _, condition in ipairs(obj.status.conditions) do
  conditions[condition.type] = condition
end
local ready, stalled = conditions["Ready"], conditions["Stalled"]
if ready == nil then
  return health
end

health.message = ready.message
if ready.status == "True" then
  health.status = "Healthy"
elseif ready.reason == "Suspended" then
  health.status = "Suspended"
elseif stalled ~= nil and stalled.status == "True" then
  health.status = "Degraded"
end
return health
