-- Slurm's burst_buffer/lua for StageFS; see README.md beside this file.
--
--   #BB_LUA stagefs stage_in source=ssh://host/data/in.dat destination=in.dat
--   #BB_LUA stagefs stage_out source=result.dat destination=ssh://host/runs/7/result.dat
--
-- slurmctld runs it as SlurmUser.  What an administrator changes are these two lines.  Where SlurmUser
-- is not root, the program is "sudo -n /usr/local/bin/stagefs", with a line in sudoers that allows it
-- `stagefs burst-buffer *`.
local program = "/usr/local/bin/stagefs"
local buffers = "/scratch/stagefs"

local remotes = {ssh = true, sftp = true, http = true, https = true, s3 = true, gs = true, az = true,
                 irods = true, file = true, webdav = true, webdavs = true}
local read_only = {http = true, https = true}

-- A name in the job's buffer.
local function is_inside(name)
   if name:find("^/") or name:find("=", 1, true) then return false end
   for part in name:gmatch("[^/]+") do
      if part == ".." then return false end
   end
   return true
end

-- nil, or what is wrong with the words behind "stagefs".
local function refusal(words)
   local kind, said, count = nil, {}, 0
   for word in words:gmatch("%S+") do
      local key, value = word:match("^([a-z]+)=(.+)$")
      if kind == nil then
         kind = word
      elseif (key ~= "source" and key ~= "destination") or said[key] then
         return "'" .. word .. "' is not source=... or destination=..., once each"
      else
         said[key] = value
         count = count + 1
      end
   end
   if kind ~= "stage_in" and kind ~= "stage_out" then
      return "it is neither stage_in nor stage_out"
   end
   if count ~= 2 then return "source=... or destination=... is missing" end
   local inside, url = said.destination, said.source
   if kind == "stage_out" then inside, url = said.source, said.destination end
   local scheme = url:match("^([a-z0-9+.-]+)://")
   if not remotes[scheme] then return "'" .. url .. "' is not a URL of a remote" end
   if kind == "stage_out" and read_only[scheme] then
      return "nothing can be written to an " .. scheme .. " server"
   end
   if not is_inside(inside) then
      return "'" .. inside .. "' is not a relative name without '=' and '..'"
   end
   return nil
end

-- Whether the script asks for a buffer; nil and why not when it does so in a wrong way.
local function asks(job_script)
   local found = false
   for line in io.lines(job_script) do
      local said = line:match("^#BB_LUA%s+(.-)%s*$")
      if said then
         local words = said:match("^stagefs%s+(.*)$")
         if words then
            local wrong = refusal(words)
            -- Slurm replaces %j, %u, ... in these lines, and drops what it does not know.
            if words:gsub("%%%%", ""):find("%%%d") then
               wrong = "Slurm takes % for its own here, so write %% for one, as in %%20"
            end
            if wrong then return nil, "stagefs: '" .. line .. "': " .. wrong .. "." end
            found = true
         elseif not said:match("^pool=") and not said:match("^capacity=") then
            return nil, "stagefs: '" .. line .. "': write #BB_LUA stagefs stage_in (or stage_out)"
                        .. " source=... destination=..."
         end
      end
   end
   return found
end

local function quoted(text)
   return "'" .. tostring(text):gsub("'", "'\\''") .. "'"
end

-- slurm.SUCCESS, or slurm.ERROR and the reason, which squeue shows.
local function run(phase, job_id, job_script, more)
   local command = "/usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 " .. program
      .. " burst-buffer " .. phase .. " --job " .. quoted(job_id) .. " --script " .. quoted(job_script)
      .. " --directory " .. quoted(buffers) .. (more or "")
   local pipe = io.popen(command .. " 2>&1", "r")
   if not pipe then return slurm.ERROR, "stagefs: " .. program .. " cannot be started" end
   local last = "stagefs: it said nothing"
   for line in pipe:lines() do last = line end
   pipe:close()
   if last == "ok" then return slurm.SUCCESS, "" end
   -- The log, too, takes % for its own.
   slurm.log_error("job %s, %s: %s", tostring(job_id), phase, (last:gsub("%%", "%%%%")))
   return slurm.ERROR, last
end

-- At sbatch, in slurmctld itself: quick, and nothing is started.
function slurm_bb_job_process(job_script, uid, gid, job_info)
   local found, wrong = asks(job_script)
   if found == nil then return slurm.ERROR, wrong end
   return slurm.SUCCESS, ""
end

function slurm_bb_pools()
   -- Slurm wants one, and counts nothing that no job asks for.
   return slurm.SUCCESS, '{"pools": [{"id": "stagefs", "quantity": 1000000, "granularity": 1}]}'
end

function slurm_bb_setup(job_id, uid, gid, pool, bb_size, job_script)
   return run("setup", job_id, job_script, " --uid " .. quoted(uid))
end

-- While the job is pending.
function slurm_bb_data_in(job_id, job_script)
   return run("data-in", job_id, job_script)
end

function slurm_bb_test_data_in(job_id)
   return slurm.SUCCESS, ""
end

function slurm_bb_real_size(job_id)
   return slurm.SUCCESS
end

function slurm_bb_paths(job_id, job_script, path_file)
   local file = io.open(path_file, "w")
   if not file then return slurm.ERROR, "stagefs: " .. path_file .. " cannot be written" end
   file:write("STAGEFS_BB=" .. buffers .. "/" .. job_id)
   file:close()
   return slurm.SUCCESS, ""
end

function slurm_bb_pre_run(job_id, job_script, uid, gid, job_info)
   return slurm.SUCCESS, ""
end

function slurm_bb_post_run(job_id)
   return slurm.SUCCESS, ""
end

-- When the job has ended and its nodes are free.
function slurm_bb_data_out(job_id, job_script)
   return run("data-out", job_id, job_script)
end

function slurm_bb_test_data_out(job_id)
   return slurm.SUCCESS, ""
end

function slurm_bb_job_teardown(job_id, job_script, hurry)
   return run("teardown", job_id, job_script, tostring(hurry) == "true" and " --hurry" or "")
end

function slurm_bb_get_status(uid, gid, ...)
   return slurm.SUCCESS, "StageFS: buffers in " .. buffers
end
